"""Generators: they map a code to a slice of a weight."""

from . import binary, linear, mlp

__all__ = ['binary', 'linear', 'mlp']
