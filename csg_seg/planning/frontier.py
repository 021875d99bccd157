"""The trade-off between size and error, of one thing to store and of several together."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

import torch
from torch import Tensor

# Sizes that a frontier keeps before a sum, while the size grows by a factor of e.
SIZES_PER_FACTOR = 400


@dataclass(frozen=True)
class Frontier:
    """Ways to store something, each with a smaller error than all smaller ones.

    Attributes:
        size: ``(n,)`` int64, rising.
        error: ``(n,)`` float64, falling.
        choices: what each way consists of.
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
    """Keep the smallest way, and the best of those with nearly the same size.

    Args:
        frontier: with positive sizes.
        sizes_per_factor: number of sizes to distinguish while the size grows by a factor of e.
    """
    step = (frontier.size.double().log() * sizes_per_factor).floor()
    last = torch.ones_like(step, dtype=torch.bool)
    last[:-1] = step[1:] > step[:-1]
    last[0] = True
    kept = last.nonzero().flatten()
    return Frontier(frontier.size[kept], frontier.error[kept], [frontier.choices[i] for i in kept.tolist()])


def _undominated(size: Tensor, error: Tensor) -> Tensor:
    """Return the indices ``(n,)`` of the ways that form a frontier, smallest size first."""
    by_error = error.argsort(stable=True)
    order = by_error[size[by_error].argsort(stable=True)]
    error = error[order]
    better = torch.ones_like(error, dtype=torch.bool)
    better[1:] = error[1:] < error.cummin(0).values[:-1]
    return order[better]
