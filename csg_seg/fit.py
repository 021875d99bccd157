"""Dense weights to generators and codes: the start of training, not its end."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .settings import Settings
from .slices import split


def gram(weights: Sequence[Tensor], settings: Settings, shares: Sequence[float]) -> Tensor:
    """Return the Gram matrix of the slices of several weights, in float64.

    Its eigenvalues say what any linear generator of these slices loses: the squared
    error of ``code_dim`` codes is the sum of all eigenvalues but the largest ``code_dim``.

    Args:
        weights: each ``(out, in, kh, kw)``.
        settings: ``slice_shape`` and ``layout`` are used.
        shares: factor on the squared error of each weight.

    Returns:
        ``(size, size)``, where size is ``s_out * s_in * kh * kw``.
    """
    first = weights[0]
    total: Tensor | None = None
    for weight, share in zip(weights, shares, strict=True):
        # float64: in float32 the tail of the spectrum is lost.
        slices = split(weight.detach().to('cpu', torch.float64), settings.slice_shape, layout=settings.layout).flatten(
            1
        )
        product = share * (slices.T @ slices)
        total = product if total is None else total.add_(product)
    assert total is not None, first.shape
    return total
