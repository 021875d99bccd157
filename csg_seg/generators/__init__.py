"""Generators: what maps a code to a slice of a weight."""
