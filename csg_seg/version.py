"""The version of this package; setup.py has it too."""

__version__ = '0.2.0'
