"""Train several configs with several seeds."""
