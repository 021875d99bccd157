"""Ways to train a generated network from a dense one."""
