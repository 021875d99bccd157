"""Generator and codes by gradient descent, where no closed form fits them."""

import math

import torch
from torch import Tensor

from csg_seg.generators.linear import Generator

from .errors import CSGError

# Adam's first step, as a share of a tensor's root mean square.
_PACE = 0.1


@torch.enable_grad()
def fit_by_descent(generator: Generator, slices: Tensor, *, steps: int, rng: torch.Generator) -> Tensor:
    """Fit codes, and in place the generator unless it is frozen, to slices.

    Adam (Kingma and Ba, ICLR 2015) on the squared error of all slices at once,
    from codes at the slices' own variance, with a pace that falls to zero along a cosine.

    Args:
        generator: of any kind, on the slices' device.
        slices: ``(n, s_out * s_in * kh * kw)``.
        steps: of Adam.
        rng: draws the start codes, on the CPU.

    Returns:
        The codes ``(n, code_dim)``.

    Raises:
        CSGError: the slices have another size than the generator's, or are all zero.
    """
    shape = generator.settings.slice_shape
    if slices.ndim != 2 or slices.shape[1] != math.prod(shape):
        raise CSGError(
            f'slices of shape {tuple(slices.shape)} do not fit a generator of {shape}; flatten them to (n, values)'
        )
    weight_std = _root_mean_square(slices)
    if weight_std == 0:
        raise CSGError('all slices are zero; leave this layer dense')
    code = generator.draw_code(len(slices), weight_std=weight_std, rng=rng).to(slices).requires_grad_()
    trained = [parameter for parameter in generator.parameters() if parameter.requires_grad]
    groups = [{'params': [code], 'lr': _PACE * _root_mean_square(code)}]
    if trained:
        groups.append({'params': trained, 'lr': _PACE * _root_mean_square(generator.weight)})
    optimizer = torch.optim.Adam(groups)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        error = generator(code).flatten(1) - slices
        # Relative, because Adam's epsilon is not.
        loss = error.square().mean() / weight_std**2
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    optimizer.zero_grad()
    return code.detach()


def _root_mean_square(values: Tensor) -> float:
    return values.detach().double().square().mean().sqrt().item()
