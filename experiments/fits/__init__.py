"""Ways to fit a generator to trained weights."""
