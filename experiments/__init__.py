"""Experiments and measurements; run one with ``python -m experiments.NAME``."""
