"""The version of this package; setup.py repeats it."""

__version__ = '0.3.0'
