"""The arithmetic of frontiers, against trying all ways."""

import itertools

import pytest
import torch

from csg_seg.planning.frontier import Frontier, either, thin, together


def draw(name, n, seed):
    rng = torch.Generator().manual_seed(seed)
    size = torch.randint(1, 60, (n,), generator=rng)
    error = torch.randint(0, 60, (n,), generator=rng).double()
    return Frontier(size, error, [((name, i),) for i in range(n)])


def points(frontier):
    return list(zip(frontier.size.tolist(), frontier.error.tolist(), strict=True))


def best_by_trying(ways):
    """The oracle: a way stays if no other is as small and as good."""
    ways = set(ways)
    return sorted(w for w in ways if not any(o != w and o[0] <= w[0] and o[1] <= w[1] for o in ways))


@pytest.mark.parametrize('seed', range(5))
def test_either_keeps_exactly_the_undominated_ways(seed):
    a, b = draw('a', 30, seed), draw('b', 17, seed + 100)
    assert points(either([a, b])) == best_by_trying(points(a) + points(b))


@pytest.mark.parametrize('seed', range(5))
def test_together_is_the_best_of_all_pairs(seed):
    a, b, c = (either([draw(name, 12, seed + 10 * i)]) for i, name in enumerate('abc'))
    sums = [
        (sum(s for s, _ in each), sum(e for _, e in each))
        for each in itertools.product(points(a), points(b), points(c))
    ]
    assert points(together([a, b, c])) == best_by_trying(sums)


def test_choices_stay_with_their_sizes_and_errors():
    a, b = either([draw('a', 20, 1)]), either([draw('b', 20, 2)])
    price = {choice: point for each in (a, b) for (choice,), point in zip(each.choices, points(each), strict=True)}
    both = together([a, b])
    for (left, right), point in zip(both.choices, points(both), strict=True):
        assert point == tuple(x + y for x, y in zip(price[left], price[right], strict=True))


def test_thin_keeps_both_ends_and_is_fine_enough():
    size = torch.arange(1000, 5000)
    frontier = Frontier(size, 1.0 / size.double(), [(i,) for i in range(len(size))])
    thinned = thin(frontier, 50)
    assert len(thinned.size) < 100
    assert (thinned.size[0], thinned.size[-1]) == (1000, 4999)
    assert (thinned.size[1:] / thinned.size[:-1]).max() < 1.05
    assert thinned.choices == [(each - 1000,) for each in thinned.size.tolist()]
