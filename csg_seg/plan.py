"""Choose slice shapes, code lengths and generators under a budget, by what :func:`csg_seg.fit` would lose.

What the best linear generator of some layers loses is known before it is made: the
eigenvalues of the Gram matrix of their slices, beyond the largest ``code_dim``. An overhang
counts as zeros to be met, though it is free: where slices overhang, this is an upper bound.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass, replace
from fractions import Fraction
from glob import escape
from os.path import commonprefix
from typing import Any

import torch
from torch import Tensor, nn

from .errors import CSGError
from .fit import gram
from .frontier import Frontier, either, thin, together
from .generator import encode_meaning
from .report import Summary, summarise
from .retrofit import CSG, check_root, fit, generable, retrofit
from .settings import Settings, matches
from .slices import grid

Shape = tuple[int, int, int, int]
Layers = tuple[str, ...]
Convs = Mapping[str, nn.Conv2d]
Spectra = Mapping[tuple[Layers, Shape], Tensor]
Track = Callable[[Sequence[Any]], Iterable[Any]]

# Sides of the slices to try: those that divide usual channel counts, and the authors' 12.
SIDES = ((4, 4), (8, 8), (8, 16), (16, 8), (12, 12), (16, 16), (16, 32), (32, 16), (32, 32))
# In fewer values there is little to share; more take minutes to diagonalise.
FEWEST_VALUES, MOST_VALUES = 64, 16 * 16 * 3 * 3
# Slices of more values than this times their number leave room for short codes alone; to save
# time they are tried only if they are asked for.
MOST_VALUES_PER_SLICE = 16
# Modules side by side that may have their own generators; if there are more, none has.
MOST_PARTS = 6
# Points of a curve for each factor e of size.
POINTS_PER_FACTOR = 100
# Layers of a smaller share of all weights stay dense, as classifiers do: they could be
# spoilt to save next to nothing.
SMALLEST_SHARE = 1 / 1000
# Layers are of like size within this factor; so many sizes are told apart.
SIZE_FACTOR, MOST_SIZES = 4, 4


@dataclass(frozen=True)
class Point:
    """A size that a network can have, and the relative error that a fit leaves at it."""

    stored_params: int
    compression_ratio: float
    relative_error: float


@dataclass(frozen=True)
class Plan:
    """Settings, what they store, and what a fit with them would lose.

    Attributes:
        csg: for :func:`csg_seg.retrofit`.
        relative_error: ``norm(W - W') / norm(W)`` over the weights of all convs together.
        layers: name of each conv, and its relative error; 0 where it stays dense.
        curve: the smallest error of each size, the smallest network first; an upper
            bound where slices overhang. Empty if the settings were given.
    """

    csg: list[dict[str, Any]]
    relative_error: float
    layers: dict[str, float]
    dense_params: int
    stored_params: int
    stored_bytes: int
    curve: tuple[Point, ...] = ()

    @property
    def compression_ratio(self) -> float:
        """Dense parameters over stored parameters."""
        return self.dense_params / self.stored_params

    def to_dict(self) -> dict[str, Any]:
        """Return everything as JSON-ready values."""
        return {**asdict(self), 'compression_ratio': self.compression_ratio}


@dataclass(frozen=True)
class Choice:
    """One generator for some layers, and what it makes and replaces."""

    layers: Layers
    slice_shape: Shape
    code_dim: int
    slices: int
    weights: int

    def size(self, unit: int | None = None) -> int:
        """Count what generator and codes store: parameters, or bytes if ``unit`` bytes hold one."""
        params = self.code_dim * (math.prod(self.slice_shape) + self.slices)
        if unit is None:
            return params
        return unit * params + len(encode_meaning(Settings(self.slice_shape, self.code_dim)))


def plan(
    model: nn.Module,
    *,
    ratio: float | None = None,
    params: int | None = None,
    bytes: int | None = None,
    slice_shapes: Sequence[Sequence[int]] | None = None,
    track: Track = iter,
) -> Plan:
    """Choose settings for a trained network under a budget, of which exactly one is given.

    The layers of one kernel size, in the whole network or in each of its parts, get a
    generator or stay dense; the smallest of them may stay dense alone.

    Args:
        model: dense, with trained weights; left as it is.
        ratio: dense parameters over stored parameters, at least.
        params: stored parameters, at most.
        bytes: of the state dict, buffers included, at most.
        slice_shapes: ``(s_out, s_in, kh, kw)`` to choose from; by default several for each kernel size.
        track: wraps the sequence of eigendecompositions, to show progress.

    Raises:
        CSGError: the budget is out of reach or no budget, or the network cannot be compressed.
    """
    check_root(model)
    summary = summarise(model)
    budget = _read_budget({'ratio': ratio, 'params': params, 'bytes': bytes}, summary)
    convs, others = _candidates(model)
    unit = next(iter(convs.values())).weight.element_size() if bytes is not None else None
    frontier = _search(convs, slice_shapes, unit, track)
    curve = _curve(frontier, _convs(model).values(), summary)
    rest = budget.dense - sum(conv.weight.numel() for conv in convs.values()) * (unit or 1)
    stored = frontier.size + rest
    affordable = int((stored <= budget.limit).sum())
    if affordable == 0:
        raise CSGError(
            f'{budget.name} is out of reach: the smallest this network can be is '
            f'{int(stored[0]):,} {budget.counts}, {curve[0].compression_ratio:.1f}x'
        )
    csg = [_to_csg(choice, model, {*convs, *others}) for choice in frontier.choices[affordable - 1]]
    return replace(predict(model, csg), curve=curve)


def trade_off(
    model: nn.Module, *, slice_shapes: Sequence[Sequence[int]] | None = None, track: Track = iter
) -> tuple[Point, ...]:
    """Return the curve of a :func:`plan`, without a budget.

    Raises:
        CSGError: the network cannot be compressed.
    """
    check_root(model)
    convs, _ = _candidates(model)
    return _curve(_search(convs, slice_shapes, None, track), _convs(model).values(), summarise(model))


def predict(model: nn.Module, csg: CSG) -> Plan:
    """Say what given settings store, and what a fit with them loses.

    Args:
        model: dense, with trained weights; left as it is.
        csg: as for :func:`csg_seg.retrofit`.

    Raises:
        CSGError: as :func:`csg_seg.retrofit`, or a weight is not finite.
    """
    check_root(model)
    convs = _convs(model)
    _check_weights(convs)
    fitted = retrofit(deepcopy(model), csg)
    errors = dict.fromkeys(convs, 0.0) | fit(fitted, model.state_dict())
    squares = sum(error**2 * _squares(convs[name]) for name, error in errors.items())
    summary = summarise(fitted)
    return Plan(
        csg=[dict(csg)] if isinstance(csg, Mapping) else [dict(each) for each in csg],
        relative_error=_relative(squares, sum(map(_squares, convs.values()))),
        layers=errors,
        dense_params=summary.dense_params,
        stored_params=summary.stored_params,
        stored_bytes=summary.stored_bytes,
    )


@dataclass(frozen=True)
class _Budget:
    """What the user asked for, and what the network counts dense."""

    name: str
    limit: int
    dense: int
    counts: str


def _read_budget(given: Mapping[str, Any], summary: Summary) -> _Budget:
    asked = {key: value for key, value in given.items() if value is not None}
    if len(asked) != 1:
        raise CSGError(f'give exactly one budget of ratio, params and bytes; got {", ".join(asked) or "none"}')
    ((key, value),) = asked.items()
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if key == 'ratio':
        if not is_number or value <= 1:
            raise CSGError(f'ratio must be a number above 1, dense over stored parameters; got {value!r}')
        # Exactly: a float quotient may round up to one parameter too many.
        return _Budget(
            f'ratio={value:g}', int(summary.dense_params // Fraction(value)), summary.dense_params, 'parameters'
        )
    dense = summary.stored_params if key == 'params' else summary.stored_bytes
    counts = 'parameters' if key == 'params' else 'bytes'
    if not is_number or value != int(value) or value < 1:
        raise CSGError(f'{key} must be a positive integer; got {value!r}')
    if value >= dense:
        raise CSGError(f'{key}={value} is met already: the network has {dense:,} {counts}; give less')
    return _Budget(f'{key}={value}', int(value), dense, counts)


def _check_weights(convs: Convs) -> None:
    if not convs:
        raise CSGError(
            'nothing to plan: the model has no nn.Conv2d that can be generated '
            '(the first, grouped and frozen ones stay dense)'
        )
    for name, conv in convs.items():
        if not conv.weight.isfinite().all():
            raise CSGError(f'{name}: its weight holds NaN or infinity; give a checkpoint of a training that converged')


def _candidates(model: nn.Module) -> tuple[Convs, set[str]]:
    """Return the convs to plan for, and the names of those that a generator would take but should not."""
    convs, refused = generable(model)
    _check_weights(convs)
    least = SMALLEST_SHARE * sum(conv.weight.numel() for conv in convs.values())
    large = {name: conv for name, conv in convs.items() if conv.weight.numel() >= least}
    return large, {*refused, *convs} - {*large}


def _search(convs: Convs, slice_shapes: Sequence[Sequence[int]] | None, unit: int | None, track: Track) -> Frontier:
    """Return the best ways to store all convs, the last of them dense."""
    by_kernel = defaultdict(list)
    for name, conv in convs.items():
        by_kernel[conv.kernel_size].append(name)
    groups = {kernel: [tuple(names), *_parts(names)] for kernel, names in by_kernel.items()}
    shapes = {kernel: _slice_shapes(kernel, slice_shapes) for kernel in groups}
    jobs = {
        (subset, shape): None
        for kernel, of_kernel in groups.items()
        for shape in shapes[kernel]
        for group in of_kernel
        for subset in _subsets(group, convs)
        if slice_shapes is not None or _pays(subset, shape, convs)
    }
    if slice_shapes is not None and not any(shapes.values()):
        kernels = ', '.join(f'{kh}x{kw}' for kh, kw in sorted(groups))
        raise CSGError(f'no slice_shapes fit the convs, whose kernels are {kernels}; got {list(slice_shapes)}')
    spectra = _spectra(list(jobs), convs, track)
    frontiers = []
    for whole, *parts in groups.values():
        ways = [_one_group(each, spectra, convs, unit) for each in (whole, *parts)]
        frontiers.append(either([ways[0], together(ways[1:])]) if parts else ways[0])
    return together(frontiers)


def _parts(names: Sequence[str]) -> list[Layers]:
    """Group layers by the modules where their names first differ; none if those are one, or too many."""
    depth = len(commonprefix([name.split('.')[:-1] for name in names])) + 1  # type: ignore[type-var]
    parts = defaultdict(list)
    for name in names:
        parts['.'.join(name.split('.')[:depth])].append(name)
    return [tuple(part) for part in parts.values()] if 1 < len(parts) <= MOST_PARTS else []


def _subsets(group: Layers, convs: Convs) -> list[Layers]:
    """Return the group without none, some or most of its smallest layers."""
    largest = max(convs[name].weight.numel() for name in group)
    size = {name: int(math.log(largest / convs[name].weight.numel(), SIZE_FACTOR)) for name in group}
    size = {name: min(each, MOST_SIZES - 1) for name, each in size.items()}
    return [tuple(name for name in group if size[name] <= most) for most in sorted(set(size.values()))]


def _slice_shapes(kernel: tuple[int, ...], given: Sequence[Sequence[int]] | None) -> list[Shape]:
    if given is not None:
        shapes = [Settings.from_dict({'slice_shape': each, 'code_dim': 1}).slice_shape for each in given]
        return [shape for shape in shapes if shape[2:] == kernel]
    kh, kw = kernel
    shapes = [(s_out, s_in, kh, kw) for s_out, s_in in SIDES]
    return [shape for shape in shapes if FEWEST_VALUES <= math.prod(shape) <= MOST_VALUES]


def _pays(layers: Layers, slice_shape: Shape, convs: Convs) -> bool:
    slices = _choice({name: convs[name] for name in layers}, slice_shape, 1).slices
    return math.prod(slice_shape) <= MOST_VALUES_PER_SLICE * slices


def _spectra(jobs: Sequence[tuple[Layers, Shape]], convs: Convs, track: Track) -> Spectra:
    """Return, for each job, the squared error ``(slice values,)`` that codes of 1, 2, ... leave."""
    grams: dict[tuple[Layers, Shape], Tensor] = {}
    spectra = {}
    for layers, shape in track(jobs):
        if any(key[1] != shape for key in grams):
            grams.clear()
        total = sum(_shared_gram(cell, shape, convs, grams) for cell in _cells(layers, shape, jobs))
        eigenvalues = torch.linalg.eigvalsh(total).clamp(min=0)
        spectra[layers, shape] = (eigenvalues.cumsum(0) - eigenvalues).flip(0)
    return spectra


def _cells(layers: Layers, shape: Shape, jobs: Sequence[tuple[Layers, Shape]]) -> list[Layers]:
    """Divide the layers into those that occur in the same jobs: their Gram matrix is computed once."""
    sets = [set(others) for others, other_shape in jobs if other_shape == shape]
    cells = defaultdict(list)
    for name in layers:
        cells[tuple(name in each for each in sets)].append(name)
    return [tuple(cell) for cell in cells.values()]


def _shared_gram(layers: Layers, shape: Shape, convs: Convs, grams: dict[tuple[Layers, Shape], Tensor]) -> Tensor:
    if (layers, shape) not in grams:
        grams[layers, shape] = gram([convs[name].weight for name in layers], Settings(shape, 1))
    return grams[layers, shape]


def _one_group(group: Layers, spectra: Spectra, convs: Convs, unit: int | None) -> Frontier:
    """Return the best ways to store a group with one generator, or dense."""
    size = {name: convs[name].weight.numel() * (unit or 1) for name in group}
    whole = sum(size.values())
    ways = [Frontier(torch.tensor([whole], device='cpu'), torch.zeros(1, dtype=torch.float64, device='cpu'), [()])]
    for (layers, shape), error in spectra.items():
        if not set(layers) <= set(group):
            continue
        chosen = {name: convs[name] for name in layers}
        first = _choice(chosen, shape, 1)
        choices = [replace(first, code_dim=length) for length in range(1, _longest(chosen, shape) + 1)]
        if choices:
            dense = whole - sum(size[name] for name in layers)
            sizes = torch.tensor([dense + each.size(unit) for each in choices], device='cpu')
            ways.append(Frontier(sizes, error[: len(choices)], [(each,) for each in choices]))
    return either(ways)


def _longest(convs: Convs, shape: Shape) -> int:
    """Return the longest code with which every layer shrinks."""
    return min((conv.weight.numel() - 1) // math.prod(grid(conv.weight.shape, shape)) for conv in convs.values())


def _choice(convs: Convs, slice_shape: Shape, code_dim: int) -> Choice:
    weights = [conv.weight for conv in convs.values()]
    slices = sum(math.prod(grid(weight.shape, slice_shape)) for weight in weights)
    return Choice(tuple(convs), slice_shape, code_dim, slices, sum(weight.numel() for weight in weights))


def _curve(frontier: Frontier, convs: Iterable[nn.Conv2d], summary: Summary) -> tuple[Point, ...]:
    frontier = thin(frontier, POINTS_PER_FACTOR)
    changes = [sum(each.size() - each.weights for each in choices) for choices in frontier.choices]
    stored = [summary.stored_params + change for change in changes]
    whole = sum(map(_squares, convs))
    return tuple(
        Point(size, summary.dense_params / size, _relative(squares, whole))
        for size, squares in zip(stored, frontier.error.tolist(), strict=True)
    )


def _relative(squares: float, whole: float) -> float:
    """Return the relative error of weights, given its squares and theirs; zeros have none."""
    return math.sqrt(squares / whole) if whole else 0.0


def _squares(conv: nn.Conv2d) -> float:
    return conv.weight.detach().double().square().sum().item()


def _convs(model: nn.Module) -> dict[str, nn.Conv2d]:
    return {name: module for name, module in model.named_modules() if isinstance(module, nn.Conv2d)}


def _to_csg(choice: Choice, model: nn.Module, reachable: Iterable[str]) -> dict[str, Any]:
    """Return the dict that gives the layers of a choice, and no others, to a generator."""
    kernel = choice.slice_shape[2:]
    # Sorted, because a set's order changes from process to process.
    others = [
        name
        for name in sorted(reachable)
        if name not in choice.layers and model.get_submodule(name).kernel_size == kernel
    ]
    settings: dict[str, Any] = {'slice_shape': list(choice.slice_shape), 'code_dim': choice.code_dim}
    include, exclude = _cover(choice.layers, others), _cover(others, choice.layers)
    if others:
        settings |= {'exclude': exclude} if len(exclude) < len(include) else {'include': include}
    return settings


def _cover(names: Iterable[str], others: Iterable[str]) -> list[str]:
    """Name modules that hold all of some layers and none of others."""
    others = list(others)
    patterns: list[str] = []
    for name in names:
        if any(matches(name, pattern) for pattern in patterns):
            continue
        steps = name.split('.')
        modules = [escape('.'.join(steps[:depth])) for depth in range(1, len(steps) + 1)]
        patterns.append(next(each for each in modules if not any(matches(other, each) for other in others)))
    return patterns
