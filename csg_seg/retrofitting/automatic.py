"""Settings by themselves: which generators give a network a compression ratio."""

import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from glob import escape
from numbers import Real
from typing import Any, NamedTuple

from torch import nn

from csg_seg.errors import CSGError
from csg_seg.generators.settings import Settings, check_keys, read_patterns
from csg_seg.generators.slices import grid
from csg_seg.layers.bank import check_root
from csg_seg.layers.conv import find_convs

from .selection import check_patterns, choose_layers, generable, not_generable

# What 'auto' asks for, where the network allows it.
RATIO = 4.0
SIDES = (16, 8, 4)
# Layers with a smaller share of all weights, such as classifiers, stay dense: compressing them saves next to nothing
# and may cost accuracy.
SMALLEST_SHARE = 1 / 1000
# Shorter codes leave a layer's slices too little freedom to be worth the few parameters they save.
SHORTEST = 8
# Generation takes time in proportion to the length of the codes, so weights that need longer ones get smaller slices.
LONGEST = 144
# Keys of a csg dict that may stand beside 'ratio'.
OTHERS = ('include', 'exclude', 'freeze_generator', 'layout', 'precision', 'seed')
# A ratio at which all codes are as short as they may be.
MOST = 1e12


class Group(NamedTuple):
    """The convs of one kernel size: how many weights are to be generated, and patterns of layers to exclude."""

    kernel: tuple[int, ...]
    weights: int
    exclude: list[str]


def suggest(model: nn.Module, ratio: float | None = None, **others: Any) -> list[dict[str, Any]]:
    """Return settings for training a network from scratch at a compression ratio.

    Each kernel size gets a generator of its own, the one with the most weights first, and only as many kernel sizes as
    the ratio needs. Slices are as large as they can be while the generator stores no more than the codes and codes have
    at most 144 values. All generators compress alike. For a trained network, :func:`csg_seg.plan` looks at the weights.

    Args:
        model: dense; its weights are not used.
        ratio: dense parameters per stored parameter. By default 4, or the square root of the largest possible ratio if
            that is less.
        others: keys of each ``csg`` dict: ``include``, ``exclude``, ``freeze_generator``, ``layout``, ``precision``;
            and ``seed``, from which each generator gets a seed of its own.

    Returns:
        for :func:`csg_seg.retrofit`.

    Raises:
        CSGError: the ratio is out of range or out of reach, or the network has nothing to compress.
    """
    check_root(model)
    if ratio is not None and (isinstance(ratio, bool) or not isinstance(ratio, Real) or not 1 < ratio < math.inf):
        raise CSGError(f'csg: ratio must be a number above 1; got {ratio!r}')
    ratio = None if ratio is None else float(ratio)
    check_keys('csg', others)
    for key in others:
        if key not in OTHERS:
            raise CSGError(
                f"csg: {key!r} does not go with 'ratio', only {', '.join(OTHERS)} do; leave out one of them, or give "
                'slice_shape and code_dim instead of ratio; to replace the csg of a base config, add _delete_=True'
            )
    seed = others.pop('seed', None)
    if seed is not None and (isinstance(seed, bool) or not isinstance(seed, int) or seed < 0):
        raise CSGError(f'csg: seed must be an integer from 0; got {seed!r}')
    groups = _groups(model, others)
    total = sum(parameter.numel() for parameter in model.parameters())
    choices = [groups[:count] for count in range(1, len(groups) + 1)]
    smallest = min(_stored(model, _settings(each, MOST, others)) for each in choices)
    most = math.floor(100 * total / smallest) / 100
    if most <= 1:
        raise CSGError('csg: generators would not make this network smaller; it has too few weights in these convs')
    if ratio is None:
        ratio = min(RATIO, math.sqrt(total / smallest))
    # Beyond twice the ratio, it is better to compress a further kernel size too, where that helps.
    *first, last = choices
    attempts = [*((each, 2 * ratio) for each in first), *((each, MOST) for each in (last, *first))]
    for chosen, limit in attempts:
        found = _search(model, chosen, total / ratio, limit, others)
        if found is not None:
            seeds = range(len(found)) if seed is None else range(seed * len(found), (seed + 1) * len(found))
            return [{**each, 'seed': own} for each, own in zip(found, seeds, strict=True)]
    share = sum(each.weights for each in groups) / total
    left = _left_dense(model, *_patterns(others))
    raise CSGError(
        f'csg: a ratio of {ratio:g} is out of reach; give at most {most:g}, which has codes of {SHORTEST} values, or '
        'give slice_shape and code_dim; csg_seg.plan finds smaller ones for a trained network. '
        f'{share:.0%} of the parameters are in convs that can be generated'
        f'{f"; left dense: {left}" if left else ""}'
    )


def resolve(model: nn.Module, csg: Any) -> Sequence[Mapping[str, Any]]:
    """Return ``csg`` as a list of dicts, with ``'auto'`` and ``dict(ratio=...)`` replaced by what they suggest.

    Raises:
        CSGError: it is neither a dict nor a list of dicts, or :func:`suggest` refuses it.
    """
    if is_automatic(csg):
        if csg != 'auto' and csg['ratio'] is None:
            raise CSGError("csg: ratio is None; give a number above 1, or csg='auto'")
        return suggest(model, **({} if csg == 'auto' else dict(csg)))
    dicts = [csg] if isinstance(csg, Mapping) else csg
    if isinstance(dicts, Sequence) and any(map(is_automatic, dicts)):
        raise CSGError("csg: 'auto' and dict(ratio=...) choose all generators and stand alone, not in a list")
    if isinstance(getattr(csg, 'csg', None), list):
        raise CSGError(f'csg: got a {type(csg).__name__}; give its csg, as in retrofit(model, plan.csg)')
    if not isinstance(dicts, Sequence) or isinstance(dicts, str) or len(dicts) == 0:
        raise CSGError(
            "csg must be a dict with slice_shape and code_dim, a list of such dicts, dict(ratio=...), or 'auto'; "
            f'got {csg!r}'
        )
    return dicts


def is_automatic(csg: Any) -> bool:
    """Whether settings are to be found by :func:`suggest`."""
    return csg == 'auto' or (isinstance(csg, Mapping) and 'ratio' in csg)


def _groups(model: nn.Module, others: Mapping[str, Any]) -> list[Group]:
    """Return the convs that may be generated by kernel size, the size with the most weights first.

    Raises:
        CSGError: there are none.
    """
    total = sum(conv.weight.numel() for conv in find_convs(model).values())
    include, exclude = _patterns(others)
    for key, patterns in (('include', include or ()), ('exclude', exclude)):
        check_patterns('csg', key, patterns, [*not_generable(model), *find_convs(model)])
    weights: dict[tuple[int, ...], int] = defaultdict(int)
    small = defaultdict(list)
    for name, conv in generable(model, include, exclude).items():
        count, kernel = conv.weight.numel(), tuple(conv.kernel_size)
        if count >= SMALLEST_SHARE * total:
            weights[kernel] += count
        else:
            small[kernel].append(escape(name))
    if not weights:
        left = _left_dense(model, include, exclude)
        raise CSGError(f'csg: there is no conv to generate; those that stay dense: {left or "none"}')
    ordered = sorted(weights, key=lambda kernel: -weights[kernel])
    return [Group(kernel, weights[kernel], [*exclude, *small[kernel]]) for kernel in ordered]


def _patterns(others: Mapping[str, Any]) -> tuple[tuple[str, ...] | None, tuple[str, ...]]:
    """Return ``include`` and ``exclude``."""
    include, exclude = (read_patterns('csg', key, others.get(key)) for key in ('include', 'exclude'))
    return include, exclude or ()


def _left_dense(model: nn.Module, include: tuple[str, ...] | None, exclude: tuple[str, ...]) -> str:
    """Return how many convs stay dense, by reason; '' for none."""
    counts = Counter(reason.cause.value for reason in not_generable(model, include, exclude).values())
    return ', '.join(f'{reason} ({count})' for reason, count in counts.most_common())


def _settings(groups: Sequence[Group], ratio: float, others: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return a dict for each kernel size that compresses it by a ratio."""
    dicts = []
    for kernel, weights, exclude in groups:
        for side in SIDES:
            size = side**2 * math.prod(kernel)
            slices = weights / size
            code_dim = min(max(int(weights / (ratio * (slices + size))), SHORTEST), size)
            if size <= slices and code_dim <= LONGEST:
                break
        dicts.append({**others, 'slice_shape': (side, side, *kernel), 'code_dim': code_dim})
        if exclude:
            dicts[-1]['exclude'] = exclude
    return dicts


def _stored(model: nn.Module, dicts: Sequence[Mapping[str, Any]]) -> float:
    """Return the parameters that a network stores with some settings, infinity if one of them takes no layer."""
    settings = [Settings.from_dict(each, position=position) for position, each in enumerate(dicts)]
    try:
        taken, _ = choose_layers(model, settings)
    except CSGError:
        return math.inf
    convs = find_convs(model)
    stored = sum(parameter.numel() for parameter in model.parameters())
    stored += sum(each.code_dim * math.prod(each.slice_shape) for each in settings)
    for name, position in taken.items():
        each, weight = settings[position], convs[name].weight
        stored += math.prod(grid(weight.shape, each.slice_shape)) * each.code_dim - weight.numel()
    return stored


def _search(
    model: nn.Module, groups: Sequence[Group], budget: float, limit: float, others: Mapping[str, Any]
) -> list[dict[str, Any]] | None:
    """Return the settings with the longest codes within a budget, None if that needs a ratio above a limit."""
    if _stored(model, _settings(groups, limit, others)) > budget:
        return None
    low, high = 1 / MOST, 1.0  # the reciprocal of the ratio of what is generated
    for _ in range(30):  # bisection: the size grows with the codes, in steps
        middle = (low + high) / 2
        fits = _stored(model, _settings(groups, 1 / middle, others)) <= budget
        low, high = (middle, high) if fits else (low, middle)
    return _settings(groups, 1 / low, others)
