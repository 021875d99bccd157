"""Data sets, and checks of data before a run."""
