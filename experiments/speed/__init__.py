"""Step and evaluation time, and memory."""
