"""Scores and sizes of a trained network on its way to the files that ship."""
