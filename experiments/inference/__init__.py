"""Memory and first image of a network from each kind of file."""
