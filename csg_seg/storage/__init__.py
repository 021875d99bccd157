"""Compact checkpoints: one small safe file for a network."""
