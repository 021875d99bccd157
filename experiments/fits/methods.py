"""Ways to fit one linear generator to trained weights: the way of csg_seg.fit, and others.

All store the same number of parameters and differ in the error that they minimise. A
scale for each filter is included because the BatchNorm after a conv absorbs it; a scale
for each slice is not, because the code absorbs it. Weights are in float64, as in
:mod:`csg_seg.fitting`.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import cast

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from csg_seg.fitting import fit_generator, gram
from csg_seg.generators.registry import build_generator
from csg_seg.generators.settings import Settings
from csg_seg.generators.slices import join, split

ROUNDS = 5
# Steps of conjugate gradients in each round; each round starts from the result of the last.
STEPS = 5
# Added to the diagonal of the moments, relative to its mean. Without it, the weights of a channel that is
# always zero would be arbitrary.
RIDGE = 1e-3


@dataclass(frozen=True)
class Layer:
    """What a way knows about a layer.

    Attributes:
        weight: ``(out, in, kh, kw)``, dense.
        moments: ``(in * kh * kw, in * kh * kw)``, mean outer product of the input's patches.
        reader: name of the next layer, if it alone reads the outputs, so that channels can be permuted.
    """

    weight: Tensor
    moments: Tensor
    reader: str | None = None


Layers = Mapping[str, Layer]
Weights = dict[str, Tensor]
Fit = Callable[[Layers, Settings], Weights]
Map = Callable[[Tensor], Tensor]


# --- errors to minimise ---


def with_zeros(layers: Layers, settings: Settings) -> Weights:
    """Truncated SVD of all slices; the overhang counts as zeros."""
    basis = _truncated_svd(layers, settings)
    fitted = {}
    for name, layer in layers.items():
        slices = split(layer.weight, settings.slice_shape).flatten(1)
        codes = slices @ basis.T
        fitted[name] = join((codes @ basis).unflatten(1, settings.slice_shape), layer.weight.shape)
    return fitted


def with_free_overhang(layers: Layers, settings: Settings) -> Weights:
    """Alternating least squares after the truncated SVD, ignoring the overhang, as ``csg_seg.fit`` does."""
    generator = build_generator(settings, torch.Generator().manual_seed(settings.seed)).double()
    codes = fit_generator(generator, [layer.weight for layer in layers.values()])
    with torch.no_grad():
        slices = [generator(code) for code in codes]
    return {name: join(made, layers[name].weight.shape) for name, made in zip(layers, slices, strict=True)}


def with_input_energies(layers: Layers, settings: Settings) -> Weights:
    """Weight errors by the mean square of input channels, layers by that of their outputs, ignoring the overhang."""
    diagonal = {}
    for name, layer in layers.items():
        kernel = math.prod(layer.weight.shape[2:])
        energies = layer.moments.diagonal().unflatten(0, (-1, kernel)).mean(1)
        diagonal[name] = replace(layer, moments=energies.repeat_interleave(kernel).diag())
    return with_input_moments(diagonal, settings)


def with_input_moments(layers: Layers, settings: Settings) -> Weights:
    """Minimise the relative error of outputs, ignoring the overhang.

    Contributions of different slices to the same output count as uncorrelated.
    """
    groups = list(_groups(layers, settings))
    basis = _truncated_svd(at_unit_norm(layers)[0], settings).unflatten(1, (settings.slice_shape[0], -1))
    for _ in range(ROUNDS):
        codes = [_encode(group, basis) for group in groups]
        basis = _improve(basis, groups, codes)
    fitted = {name: torch.empty_like(layer.weight) for name, layer in layers.items()}
    for group in groups:
        slices = (_encode(group, basis) @ basis.flatten(1)).unflatten(1, basis.shape[1:])
        part = fitted[group.layer][group.rows, group.columns]
        part.copy_(group.kept(slices).reshape(part.shape))
    return fitted


def with_permuted_channels(layers: Layers, settings: Settings) -> Weights:
    """Order hidden channels so that slices become similar, then fit, ignoring the overhang.

    Channels between two convs can be permuted if only norm and activation are between
    them. The first order is by norm. Then a truncated SVD alternates with the assignment
    of channels to places that is nearest to the generated weights.
    """
    dense = {name: layer.weight for name, layer in layers.items()}
    pairs = [name for name, layer in layers.items() if layer.reader in layers]
    orders = {name: _hidden_channels(layers, name, dense).norm(dim=1).argsort() for name in pairs}
    for _ in range(ROUNDS):
        made = with_zeros(permuted(layers, orders), settings)
        orders = {name: _assign(layers, name, made) for name in orders}
    made = with_free_overhang(permuted(layers, orders), settings)
    # In the original order again, so that the network computes the same.
    back = {name: order.argsort() for name, order in orders.items()}
    fitted = {name: replace(layers[name], weight=weight) for name, weight in made.items()}
    return {name: layer.weight for name, layer in permuted(fitted, back).items()}


# --- scales of layers or filters before the fit; undone exactly afterwards ---

Scaled = tuple[Layers, dict[str, Tensor]]


def as_they_are(layers: Layers) -> Scaled:
    """Do not scale: large weights count most."""
    return _scaled(layers, lambda layer: torch.ones((), dtype=torch.float64))


def at_unit_norm(layers: Layers) -> Scaled:
    """Scale each layer to norm 1: relative errors count, equally for all layers. Codes absorb the scale."""
    return _scaled(layers, lambda layer: layer.weight.norm())


def at_unit_mean_square(layers: Layers) -> Scaled:
    """Scale each layer to mean square 1: relative errors count, by layer size. Codes absorb the scale."""
    return _scaled(layers, lambda layer: layer.weight.square().mean().sqrt())


def with_unit_filters(layers: Layers) -> Scaled:
    """Scale each filter to norm 1. The BatchNorm after it absorbs the scale."""
    return _scaled(layers, lambda layer: layer.weight.flatten(1).norm(dim=1).view(-1, 1, 1, 1))


def with_unit_outputs(layers: Layers) -> Scaled:
    """Scale each filter to outputs of mean square 1. The BatchNorm after it absorbs the scale."""
    return _scaled(layers, lambda layer: output_energies(layer.weight, layer).sqrt().view(-1, 1, 1, 1))


FITS: dict[str, tuple[Callable[[Layers], Scaled], Fit]] = {
    'truncated SVD': (as_they_are, with_zeros),
    'SVD, layers at unit norm': (at_unit_norm, with_zeros),
    'SVD, layers at unit mean square': (at_unit_mean_square, with_zeros),
    'free overhang (csg_seg.fit)': (as_they_are, with_free_overhang),
    'free, layers at unit norm': (at_unit_norm, with_free_overhang),
    'free, unit filters': (with_unit_filters, with_free_overhang),
    'free, permuted channels': (as_they_are, with_permuted_channels),
    'input energies': (as_they_are, with_input_energies),
    'input moments': (as_they_are, with_input_moments),
    'input moments, unit outputs': (with_unit_outputs, with_input_moments),
}


def fit_by(way: str, layers: Layers, settings: Settings) -> Weights:
    """Return the fitted weight of each layer, by one of :data:`FITS`."""
    scale, fit = FITS[way]
    scaled, factors = scale(layers)
    return {name: weight * factors[name] for name, weight in fit(scaled, settings).items()}


# --- least squares over outputs ---


@dataclass(frozen=True)
class _Group:
    """A column of slices of a layer with the same inputs and the same crop.

    Attributes:
        layer: name of the layer.
        rows: output channels that the slices cover.
        columns: input channels that they cover.
        target: ``(n, kept_out, kept_in * kh * kw)``, the dense weights.
        moments: second moments of their inputs, divided by the energy of the layer's outputs.
    """

    layer: str
    rows: slice
    columns: slice
    target: Tensor
    moments: Tensor

    def kept(self, basis: Tensor) -> Tensor:
        """Crop slices ``(n, s_out, s_in * kh * kw)``."""
        _, kept_out, kept_values = self.target.shape
        return basis[:, :kept_out, :kept_values]


def _groups(layers: Layers, settings: Settings) -> Iterator[_Group]:
    s_out, s_in, *kernel = settings.slice_shape
    values = math.prod(kernel)
    for name, layer in layers.items():
        out, into = layer.weight.shape[:2]
        ridge = RIDGE * layer.moments.diagonal().mean() * torch.eye(len(layer.moments), dtype=torch.float64)
        moments = (layer.moments + ridge) / output_energies(layer.weight, layer).sum()
        whole = out - out % s_out
        for top, bottom in [(0, whole), (whole, out)] if 0 < whole < out else [(0, out)]:
            for left in range(0, into, s_in):
                right = min(left + s_in, into)
                target = layer.weight[top:bottom, left:right].reshape(
                    -1, min(s_out, bottom - top), values * (right - left)
                )
                seen = moments[values * left : values * right, values * left : values * right]
                yield _Group(name, slice(top, bottom), slice(left, right), target, seen)


def _encode(group: _Group, basis: Tensor) -> Tensor:
    """Return the optimal codes ``(n, code_dim)`` for a basis ``(code_dim, s_out, s_in * kh * kw)``."""
    kept = group.kept(basis)
    weighed = (kept @ group.moments).flatten(1)
    # A cropped slice may have fewer values than a code.
    inverse = torch.linalg.pinv(weighed @ kept.flatten(1).T, hermitian=True)
    return group.target.flatten(1) @ weighed.T @ inverse


def _improve(basis: Tensor, groups: Sequence[_Group], codes: Sequence[Tensor]) -> Tensor:
    """Improve a basis for given codes by conjugate gradients.

    The preconditioner is the inverse second moments of codes on one side, of inputs on the other.
    """
    squares = [code.T @ code for code in codes]

    def apply(direction: Tensor) -> Tensor:
        total = torch.zeros_like(direction)
        for group, square in zip(groups, squares, strict=True):
            kept = group.kept(direction)
            group.kept(total).add_((square @ kept.flatten(1)).view(kept.shape) @ group.moments)
        return total

    wanted = torch.zeros_like(basis)
    seen = torch.zeros(basis.shape[2], basis.shape[2], dtype=torch.float64)
    for group, code in zip(groups, codes, strict=True):
        kept = (code.T @ group.target.flatten(1)).unflatten(1, group.target.shape[1:])
        group.kept(wanted).add_(kept @ group.moments)
        seen[: len(group.moments), : len(group.moments)] += group.moments
    left, right = (torch.linalg.pinv(each, hermitian=True) for each in (sum(squares), seen))

    def precondition(residual: Tensor) -> Tensor:
        return (left @ residual.flatten(1)).view(residual.shape) @ right

    return _conjugate_gradients(apply, precondition, wanted, start=basis)


def _conjugate_gradients(apply: Map, precondition: Map, wanted: Tensor, *, start: Tensor) -> Tensor:
    """Take :data:`STEPS` steps towards the solution of ``apply(x) == wanted``."""
    residual = wanted - apply(start)
    direction = steepest = precondition(residual)
    size = (residual * steepest).sum()
    for _ in range(STEPS):
        if size == 0:  # solved
            break
        change = apply(direction)
        length = size / (direction * change).sum()
        start, residual = start + length * direction, residual - length * change
        steepest = precondition(residual)
        size, before = (residual * steepest).sum(), size
        direction = steepest + size / before * direction
    return start


# --- helpers ---


def _truncated_svd(layers: Layers, settings: Settings) -> Tensor:
    """Return orthonormal rows ``(code_dim, size)``."""
    total = gram([layer.weight for layer in layers.values()], settings)
    return torch.linalg.eigh(total).eigenvectors[:, -settings.code_dim :].T


def output_energies(weight: Tensor, layer: Layer) -> Tensor:
    """Return the mean square ``(out,)`` of each output channel for a weight and a layer's inputs."""
    filters = weight.flatten(1)
    return ((filters @ layer.moments) * filters).sum(1)


def _scaled(layers: Layers, measure: Callable[[Layer], Tensor]) -> Scaled:
    factors = {name: measure(layer) for name, layer in layers.items()}
    factors = {name: torch.where(factor > 0, factor, 1.0) for name, factor in factors.items()}
    scaled = {name: replace(layer, weight=layer.weight / factors[name]) for name, layer in layers.items()}
    return scaled, factors


def permuted(layers: Layers, orders: Mapping[str, Tensor]) -> Layers:
    """Permute hidden channels in the weights of both convs. The moments stay unchanged."""
    permuted = dict(layers)
    for name, order in orders.items():
        reader = cast(str, layers[name].reader)
        permuted[name] = replace(permuted[name], weight=permuted[name].weight[order])
        permuted[reader] = replace(permuted[reader], weight=permuted[reader].weight[:, order])
    return permuted


def _hidden_channels(layers: Layers, name: str, weights: Weights) -> Tensor:
    """Return ``(channels, values)``: each hidden channel's weights in this conv and the next."""
    reader = cast(str, layers[name].reader)
    return torch.cat([weights[name].flatten(1), weights[reader].transpose(0, 1).flatten(1)], dim=1)


def _assign(layers: Layers, name: str, made: Weights) -> Tensor:
    """Return the order of hidden channels that is nearest to the generated weights."""
    dense = {each: layer.weight for each, layer in layers.items()}
    channels, places = (_hidden_channels(layers, name, weights) for weights in (dense, made))
    channel, place = linear_sum_assignment(torch.cdist(channels, places).square().numpy())
    order = torch.empty(len(channels), dtype=torch.long)
    order[torch.from_numpy(place)] = torch.from_numpy(channel)
    return order
