"""Bytes that workers exchange in a training step."""
