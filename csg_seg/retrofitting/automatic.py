"""Settings by themselves: which generators give a network a compression ratio."""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn
from torch.nn.modules.conv import _ConvNd

from csg_seg.errors import CSGError
from csg_seg.generators.settings import Settings, matches, read_patterns
from csg_seg.layers.conv import find_convs

from .selection import choose_layers, generable, not_generable

# What 'auto' asks for, where the network allows it.
RATIO = 4.0
SIDES = (16, 8, 4)
# Layers with a smaller share of all weights, such as classifiers, stay dense.
SMALLEST_SHARE = 1 / 1000
# Shorter codes leave a layer's slices too little freedom to be worth the few parameters they save.
SHORTEST = 8
# Generation takes time in proportion to the length of the codes, so weights that need longer ones get smaller slices.
LONGEST = 144
# Keys of a csg dict that may stand beside 'ratio'.
OTHERS = ('include', 'exclude', 'freeze_generator', 'layout', 'precision', 'seed')
Kernel = tuple[int, ...]


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
    if ratio is not None and (
        isinstance(ratio, bool) or not isinstance(ratio, (int, float)) or not 1 < ratio < math.inf
    ):
        raise CSGError(f'csg: ratio must be a number above 1; got {ratio!r}')
    for key in others:
        if key not in OTHERS:
            raise CSGError(f"csg: {key!r} does not go with 'ratio', only {', '.join(OTHERS)}; give slice_shape too")
    seed = others.pop('seed', None)
    if seed is not None and not (isinstance(seed, int) and seed >= 0):
        raise CSGError(f'csg: seed must be an integer from 0; got {seed!r}')
    kernels = _kernels(model, others)
    total = sum(parameter.numel() for parameter in model.parameters())
    smallest = min(_stored(model, _settings(model, each, math.inf, others)) for each in _first_of(kernels))
    if smallest >= total:
        raise CSGError('csg: generators would make this network larger; it has too few weights in convs')
    if ratio is None:
        ratio = min(RATIO, math.sqrt(total / smallest))
    for chosen in _first_of(kernels):
        # Beyond twice the ratio, it is better to compress a further kernel size too.
        limit = 2 * ratio if len(chosen) < len(kernels) else math.inf
        found = _search(model, chosen, total / ratio, limit, others)
        if found is not None:
            return (
                found
                if seed is None
                else [{**each, 'seed': seed * len(found) + position} for position, each in enumerate(found)]
            )
    share = sum(map(_count, kernels.values())) / total
    raise CSGError(
        f'csg: a ratio of {ratio:g} is out of reach: with codes of {SHORTEST} values this network becomes '
        f'{math.floor(10 * total / smallest) / 10} times smaller; {share:.0%} of its parameters are in convs that can '
        'be generated'
    )


def resolve(model: nn.Module, csg: Any) -> Sequence[Mapping[str, Any]]:
    """Return ``csg`` as a list of dicts, with ``'auto'`` and ``dict(ratio=...)`` replaced by what they suggest.

    Raises:
        CSGError: it is neither a dict nor a list of dicts, or :func:`suggest` refuses it.
    """
    if is_automatic(csg):
        return suggest(model, **({} if csg == 'auto' else dict(csg)))
    dicts = [csg] if isinstance(csg, Mapping) else csg
    if isinstance(dicts, Sequence) and any(map(is_automatic, dicts)):
        raise CSGError("csg: 'auto' and dict(ratio=...) choose all generators and stand alone, not in a list")
    if not isinstance(dicts, Sequence) or isinstance(dicts, str) or len(dicts) == 0:
        raise CSGError(
            "csg must be a dict with slice_shape and code_dim, a list of such dicts, dict(ratio=...), or 'auto'; "
            f'got {csg!r}'
        )
    return dicts


def is_automatic(csg: Any) -> bool:
    """Whether settings are to be found by :func:`suggest`."""
    return csg == 'auto' or (isinstance(csg, Mapping) and 'ratio' in csg)


def _kernels(model: nn.Module, others: Mapping[str, Any]) -> dict[Kernel, dict[str, _ConvNd]]:
    """Return the convs that may be generated by kernel size, the size with the most weights first.

    Raises:
        CSGError: there are none.
    """
    total = sum(conv.weight.numel() for conv in find_convs(model).values())
    found: dict[Kernel, dict[str, _ConvNd]] = defaultdict(dict)
    include, exclude = (read_patterns('csg', key, others.get(key)) for key in ('include', 'exclude'))
    for name, conv in generable(model).items():
        wanted = include is None or any(matches(name, pattern) for pattern in include)
        wanted = wanted and not any(matches(name, pattern) for pattern in exclude or ())
        if wanted and conv.weight.numel() >= SMALLEST_SHARE * total:
            found[tuple(conv.kernel_size)][name] = conv
    if not found:
        why = next((f'; {name}: {reason}' for name, reason in not_generable(model).items()), '')
        raise CSGError(f'csg: the network has no conv that can be generated, or none that is included{why}')
    return dict(sorted(found.items(), key=lambda each: -_count(each[1])))


def _first_of(kernels: Mapping[Kernel, dict[str, _ConvNd]]) -> list[dict[Kernel, dict[str, _ConvNd]]]:
    """Return the first kernel size, the first two, and so on up to all."""
    return [dict(list(kernels.items())[:count]) for count in range(1, len(kernels) + 1)]


def _count(convs: Mapping[str, _ConvNd]) -> int:
    return sum(conv.weight.numel() for conv in convs.values())


def _settings(
    model: nn.Module, kernels: Mapping[Kernel, Mapping[str, _ConvNd]], ratio: float, others: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """Return a dict for each kernel size that compresses it by a ratio; the shortest codes for infinity."""
    chosen = {name for convs in kernels.values() for name in convs}
    small = sorted({*generable(model)} - chosen)
    dicts = []
    for kernel, convs in kernels.items():
        weights, values = _count(convs), math.prod(kernel)
        for side in SIDES:
            slices, size = weights / (side**2 * values), side**2 * values
            code_dim = min(max(int(weights / (ratio * (slices + size))), SHORTEST), size)
            if size <= slices and code_dim <= LONGEST:
                break
        exclude = others.get('exclude') or []
        exclude = [exclude] if isinstance(exclude, str) else list(exclude)
        same = [name for name in small if tuple(find_convs(model)[name].kernel_size) == kernel]
        dicts.append({**others, 'slice_shape': (side, side, *kernel), 'code_dim': code_dim})
        if exclude + same:
            dicts[-1]['exclude'] = exclude + same
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
        rows, cols = (-(-size // side) for size, side in zip(weight.shape, each.slice_shape[:2], strict=False))
        stored += rows * cols * each.code_dim - weight.numel()
    return stored


def _search(
    model: nn.Module,
    kernels: Mapping[Kernel, Mapping[str, _ConvNd]],
    budget: float,
    limit: float,
    others: Mapping[str, Any],
) -> list[dict[str, Any]] | None:
    """Return the settings with the longest codes within a budget, None if that needs a ratio above a limit."""
    low, high = 0.0, 1.0  # the reciprocal of the ratio of what is generated
    if _stored(model, _settings(model, kernels, min(limit, 1e12), others)) > budget:
        return None
    for _ in range(30):  # bisection: the size grows with the codes, in steps
        middle = (low + high) / 2
        fits = _stored(model, _settings(model, kernels, 1 / middle, others)) <= budget
        low, high = (middle, high) if fits else (low, middle)
    return _settings(model, kernels, 1 / low if low else 1e12, others)
