"""Checkpoint files of mmengine, read safely, and compact files that describe their network."""
