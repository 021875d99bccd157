"""How long the rows of a generator start."""

import math

from .settings import Settings


def row_length(settings: Settings) -> float:
    """Return the length that a generator's rows start at, ``(slice values / code_dim) ** (1 / 4)``.

    A gradient step on a code moves the weight along the dense step's projection on
    the rows' span, times their squared length. The projection keeps a share
    ``code_dim / slice values`` of the squared length of a step without direction;
    this gives it back, so that a weight moves as far as the dense one would.
    """
    # Two square roots, which every machine rounds alike; a power it may not.
    return math.sqrt(math.sqrt(math.prod(settings.slice_shape) / settings.code_dim))


def sign_value(settings: Settings) -> float:
    """Return the size of every value of a binary generator, so that its rows have :func:`row_length`."""
    return row_length(settings) / math.sqrt(math.prod(settings.slice_shape))
