"""Checkpoint files: read safely, loaded strictly, and written as compact files that describe their network."""
