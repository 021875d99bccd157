"""The trade-off of size against error: what can be had, alone and together."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

import torch
from torch import Tensor

# Between two sums a frontier keeps this many sizes for each factor e.
SIZES_PER_FACTOR = 400


@dataclass(frozen=True)
class Frontier:
    """Ways to store something, none of which is both smaller and better than another.

    Attributes:
        size: ``(n,)`` int64, rising.
        error: ``(n,)`` float64, falling.
        choices: what was chosen for each.
    """

    size: Tensor
    error: Tensor
    choices: Sequence[tuple[Any, ...]]


def either(frontiers: Iterable[Frontier]) -> Frontier:
    """Return the best of several ways to store the same thing."""
    frontiers = list(frontiers)
    choices = [choice for each in frontiers for choice in each.choices]
    size, error = (torch.cat([getattr(each, key) for each in frontiers]) for key in ('size', 'error'))
    kept = _undominated(size, error)
    return Frontier(size[kept], error[kept], [choices[i] for i in kept.tolist()])


def together(frontiers: Iterable[Frontier]) -> Frontier:
    """Return the best ways to store several things: sizes and errors add up."""
    return reduce(_sum, frontiers)


def _sum(left: Frontier, right: Frontier) -> Frontier:
    left, right = thin(left, SIZES_PER_FACTOR), thin(right, SIZES_PER_FACTOR)
    size = (left.size[:, None] + right.size).flatten()
    error = (left.error[:, None] + right.error).flatten()
    kept = _undominated(size, error)
    choices = [left.choices[i] + right.choices[j] for i, j in (divmod(k, len(right.size)) for k in kept.tolist())]
    return Frontier(size[kept], error[kept], choices)


def thin(frontier: Frontier, sizes_per_factor: int) -> Frontier:
    """Keep the smallest, and the best of those that are nearly of one size.

    Args:
        frontier: of positive sizes.
        sizes_per_factor: how many to tell apart for each factor e of size.
    """
    step = (frontier.size.double().log() * sizes_per_factor).floor()
    last = torch.ones_like(step, dtype=torch.bool)
    last[:-1] = step[1:] > step[:-1]
    last[0] = True
    kept = last.nonzero().flatten()
    return Frontier(frontier.size[kept], frontier.error[kept], [frontier.choices[i] for i in kept.tolist()])


def _undominated(size: Tensor, error: Tensor) -> Tensor:
    """Return the indices ``(n,)`` of a frontier, smallest size first."""
    by_error = error.argsort(stable=True)
    order = by_error[size[by_error].argsort(stable=True)]
    error = error[order]
    better = torch.ones_like(error, dtype=torch.bool)
    better[1:] = error[1:] < error.cummin(0).values[:-1]
    return order[better]
