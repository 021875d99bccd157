"""Choose settings for a network under a budget, by the error that :func:`csg_seg.fit` would leave."""

import math
from collections.abc import Iterable, Mapping, Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass, field, replace
from fractions import Fraction
from glob import escape
from numbers import Real
from typing import Any

from torch import nn

from csg_seg.errors import CSGError
from csg_seg.generators.settings import matches
from csg_seg.layers.bank import check_root
from csg_seg.report import Summary, summarise
from csg_seg.retrofitting.automatic import SMALLEST_SHARE, resolve
from csg_seg.retrofitting.selection import generable
from csg_seg.retrofitting.surgery import CSG, retrofit
from csg_seg.retrofitting.weights import fit

from .frontier import Frontier, thin
from .search import Choice, Convs, Track, search_settings

# Points of a curve while the size grows by a factor of e.
POINTS_PER_FACTOR = 100


@dataclass(frozen=True)
class Point:
    """A size that a network can have, and the relative error of a fit at this size."""

    stored_params: int
    compression_ratio: float
    relative_error: float


@dataclass(frozen=True)
class Plan:
    """Settings, what they store, and the error of a fit with them.

    Attributes:
        csg: for :func:`csg_seg.retrofit`.
        relative_error: ``norm(W - W') / norm(W)`` over the weights of all convs together.
        layers: the relative error of each conv by name; 0 where it stays dense.
        curve: the smallest error at each size, from the smallest size up; an upper bound where slices overhang.
            Empty if the settings were given.
    """

    csg: list[dict[str, Any]]
    relative_error: float
    layers: dict[str, float] = field(repr=False)
    dense_params: int
    stored_params: int
    stored_bytes: int
    curve: tuple[Point, ...] = field(default=(), repr=False)

    @property
    def compression_ratio(self) -> float:
        """Dense parameters over stored parameters."""
        return self.dense_params / self.stored_params

    def to_dict(self) -> dict[str, Any]:
        """Return everything as JSON-ready values."""
        return {**asdict(self), 'compression_ratio': self.compression_ratio}


def plan(
    model: nn.Module,
    *,
    ratio: float | None = None,
    params: int | None = None,
    bytes: int | None = None,
    slice_shapes: Sequence[Sequence[int]] | None = None,
    track: Track = iter,
) -> Plan:
    """Choose settings for a trained network under a budget; give exactly one of ``ratio``, ``params``, ``bytes``.

    For each kernel size, one generator serves the whole network or each part has its own; the smallest layers, or all,
    may stay dense.

    Args:
        model: dense, with trained weights; it is not changed.
        ratio: least dense parameters per stored parameter.
        params: most stored parameters.
        bytes: most bytes of the state dict, buffers included.
        slice_shapes: ``(s_out, s_in, kh, kw)`` to choose from; by default several for each kernel size.
        track: wraps the sequence of eigendecompositions, to show progress.

    Returns:
        The settings, for :func:`csg_seg.retrofit`, with the error of each layer and the trade-off.

    Raises:
        CSGError: the budget is out of reach or invalid, or the network cannot be compressed.
    """
    check_root(model)
    summary = summarise(model)
    budget = _read_budget({'ratio': ratio, 'params': params, 'bytes': bytes}, summary)
    convs, others = _candidates(model)
    unit = next(iter(convs.values())).weight.element_size() if bytes is not None else None
    frontier = search_settings(convs, slice_shapes, unit, track)
    curve = _curve(frontier, _convs(model).values(), summary)
    rest = budget.dense - sum(conv.weight.numel() for conv in convs.values()) * (unit or 1)
    stored = frontier.size + rest
    affordable = int((stored <= budget.limit).sum())
    if affordable == 0:
        raise CSGError(
            f'{budget.name} is out of reach: the smallest this network can be is '
            f'{int(stored[0]):,} {budget.unit}, {curve[0].compression_ratio:.1f}x'
        )
    csg = [_to_csg(choice, model, sorted({*convs, *others})) for choice in frontier.choices[affordable - 1]]
    return replace(predict(model, csg), curve=curve)


def trade_off(
    model: nn.Module, *, slice_shapes: Sequence[Sequence[int]] | None = None, track: Track = iter
) -> tuple[Point, ...]:
    """Return the curve of :func:`plan` without a budget.

    Raises:
        CSGError: the network cannot be compressed.
    """
    check_root(model)
    convs, _ = _candidates(model)
    return _curve(search_settings(convs, slice_shapes, None, track), _convs(model).values(), summarise(model))


def predict(model: nn.Module, csg: CSG) -> Plan:
    """Return what given settings store, and the error of a fit with them.

    Args:
        model: dense, with trained weights; it is not changed.
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
        csg=[dict(each) for each in resolve(model, csg)],
        relative_error=_relative(squares, sum(map(_squares, convs.values()))),
        layers=errors,
        dense_params=summary.dense_params,
        stored_params=summary.stored_params,
        stored_bytes=summary.stored_bytes,
    )


@dataclass(frozen=True)
class _Budget:
    """The user's budget: its text for errors, its limit, the dense network's count, and what is counted."""

    name: str
    limit: int
    dense: int
    unit: str


def _read_budget(given: Mapping[str, Any], summary: Summary) -> _Budget:
    asked = {key: value for key, value in given.items() if value is not None}
    if len(asked) != 1:
        raise CSGError(f'give exactly one budget of ratio, params and bytes; got {", ".join(asked) or "none"}')
    ((key, value),) = asked.items()
    is_number = isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
    if key == 'ratio':
        if not is_number or value <= 1:
            raise CSGError(f'ratio must be a number above 1, dense over stored parameters; got {value!r}')
        value = float(value)
        # In fractions: a float quotient may round up to one parameter too many.
        limit = int(summary.dense_params // Fraction(value))
        return _Budget(f'ratio={value:g}', limit, summary.dense_params, 'parameters')
    dense, unit = (summary.stored_params, 'parameters') if key == 'params' else (summary.stored_bytes, 'bytes')
    if not is_number or value != int(value) or value < 1:
        raise CSGError(f'{key} must be a positive integer; got {value!r}')
    if value >= dense:
        raise CSGError(f'{key}={value} is already met: the network has {dense:,} {unit}; give less')
    return _Budget(f'{key}={value}', int(value), dense, unit)


def _check_weights(convs: Convs) -> None:
    if not convs:
        raise CSGError(
            'nothing to plan: the model has no nn.Conv2d that can be generated '
            '(the first and frozen ones stay dense, grouped and transposed ones are not planned)'
        )
    for name, conv in convs.items():
        if not conv.weight.isfinite().all():
            raise CSGError(
                f'{name}: its weight holds NaN or infinity; give a checkpoint from a training that converged'
            )


def _candidates(model: nn.Module) -> tuple[Convs, set[str]]:
    """Return the convs to plan for, and the names of other convs that a generator could take but should not."""
    everything = generable(model)
    convs = {name: conv for name, conv in everything.items() if isinstance(conv, nn.Conv2d) and conv.groups == 1}
    _check_weights(convs)
    least = SMALLEST_SHARE * sum(conv.weight.numel() for conv in convs.values())
    large = {name: conv for name, conv in convs.items() if conv.weight.numel() >= least}
    return large, {*everything} - {*large}


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
    """Return the relative error from squared norms; weights of zero have none."""
    return math.sqrt(squares / whole) if whole else 0.0


def _squares(conv: nn.Conv2d) -> float:
    return conv.weight.detach().double().square().sum().item()


def _convs(model: nn.Module) -> dict[str, nn.Conv2d]:
    return {name: module for name, module in model.named_modules() if isinstance(module, nn.Conv2d)}


def _to_csg(choice: Choice, model: nn.Module, reachable: Iterable[str]) -> dict[str, Any]:
    """Return the settings with which a generator takes the layers of a choice and no others."""
    kernel = choice.slice_shape[2:]
    others = [
        name for name in reachable if name not in choice.layers and model.get_submodule(name).kernel_size == kernel
    ]
    settings: dict[str, Any] = {'slice_shape': list(choice.slice_shape), 'code_dim': choice.code_dim}
    include, exclude = _cover(choice.layers, others), _cover(others, choice.layers)
    if others:
        settings |= {'exclude': exclude} if len(exclude) < len(include) else {'include': include}
    return settings


def _cover(names: Iterable[str], others: Iterable[str]) -> list[str]:
    """Return patterns of modules that together contain all of some layers and none of others."""
    others = list(others)
    patterns: list[str] = []
    for name in names:
        if any(matches(name, pattern) for pattern in patterns):
            continue
        parts = name.split('.')
        modules = [escape('.'.join(parts[:depth])) for depth in range(1, len(parts) + 1)]
        patterns.append(next(each for each in modules if not any(matches(other, each) for other in others)))
    return patterns
