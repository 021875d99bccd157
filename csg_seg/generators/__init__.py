"""Generators: they map a code to a slice of a weight."""

from . import binary, mlp, registry

__all__ = ['binary', 'mlp', 'registry']
