"""The length of a generator's rows at the start of training."""

import math

from .settings import Settings


def row_length(settings: Settings) -> float:
    """Return the initial length of a generator's rows, ``(slice values / code_dim) ** (1 / 4)``.

    A gradient step on a code moves the weight along the projection of the dense
    step on the span of the rows, times their squared length. For a step in a random
    direction, the projection keeps ``code_dim / slice values`` of its squared length.
    Rows of this length compensate for it: the weight moves as far as a dense weight would.
    """
    # Square roots are rounded alike on every machine; powers may not be.
    return math.sqrt(math.sqrt(math.prod(settings.slice_shape) / settings.code_dim))
