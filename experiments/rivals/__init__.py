"""Other kinds of generators."""
