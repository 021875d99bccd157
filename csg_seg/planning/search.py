"""Search the best slice shapes, code lengths and layers of generators, at every size.

The squared error of the best linear generator for some layers is the sum of the eigenvalues of their slices' Gram
matrix, except the largest ``code_dim``. It is an upper bound where slices overhang, because it counts the overhang as
zeros to approximate.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from os.path import commonprefix
from typing import Any

import torch
from torch import Tensor, nn

from csg_seg.errors import CSGError
from csg_seg.fitting import gram
from csg_seg.generators.settings import Settings
from csg_seg.generators.signature import encode_signature
from csg_seg.generators.slices import grid

from .frontier import Frontier, either, together

Shape = tuple[int, ...]
Layers = tuple[str, ...]
Convs = Mapping[str, nn.Conv2d]
Spectra = Mapping[tuple[Layers, Shape], Tensor]
Track = Callable[[Sequence[Any]], Iterable[Any]]

# Slices to try: sizes that divide usual channel counts, and the authors' 12.
SIDES = ((4, 4), (8, 8), (8, 16), (16, 8), (12, 12), (16, 16), (16, 32), (32, 16), (32, 32))
# Smaller slices have little to share; larger ones take minutes to diagonalise.
FEWEST_VALUES, MOST_VALUES = 64, 16 * 16 * 3 * 3
# Slices with more values than this times their number allow only short codes; to save time, they are tried only if
# the user gives their shape.
MOST_VALUES_PER_SLICE = 16
# Up to this many sibling modules, each may have its own generator.
MOST_PARTS = 6
# Layers within this factor have the same size class; there are at most so many classes.
SIZE_FACTOR, MOST_SIZES = 4, 4


@dataclass(frozen=True)
class Choice:
    """One generator for some layers: its settings, and the numbers of slices it makes and weights it replaces."""

    layers: Layers
    weight_shapes: tuple[Shape, ...]
    slice_shape: Shape
    code_dim: int
    slices: int
    weights: int

    def size(self, unit: int | None = None) -> int:
        """Return what generator and codes store, in parameters, or in bytes if a parameter takes ``unit`` bytes."""
        params = self.code_dim * (math.prod(self.slice_shape) + self.slices)
        if unit is None:
            return params
        layers = dict(zip(self.layers, self.weight_shapes, strict=True))
        return unit * params + encode_signature(Settings(self.slice_shape, self.code_dim), layers).nbytes


def search_settings(
    convs: Convs, slice_shapes: Sequence[Sequence[int]] | None, unit: int | None, track: Track
) -> Frontier:
    """Return the best ways to store all convs; in the last one, all are dense.

    Args:
        convs: by name.
        slice_shapes: to choose from; None for several of each kernel size.
        unit: bytes of a parameter, to measure sizes in bytes.
        track: wraps the sequence of eigendecompositions, to show progress.

    Raises:
        CSGError: none of the shapes fits a conv.
    """
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
    """Group layers by the sibling modules where their names first differ; return no group for one or too many."""
    depth = len(commonprefix([name.split('.')[:-1] for name in names])) + 1  # type: ignore[type-var]
    parts = defaultdict(list)
    for name in names:
        parts['.'.join(name.split('.')[:depth])].append(name)
    return [tuple(part) for part in parts.values()] if 1 < len(parts) <= MOST_PARTS else []


def _subsets(group: Layers, convs: Convs) -> list[Layers]:
    """Return the group itself, and without more and more of its smallest layers."""
    largest = max(convs[name].weight.numel() for name in group)
    steps = {name: int(math.log(largest / convs[name].weight.numel(), SIZE_FACTOR)) for name in group}
    size = {name: min(each, MOST_SIZES - 1) for name, each in steps.items()}
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
    """Return, for each job, the squared errors ``(slice values,)`` with codes of length 1, 2, ..."""
    spectra = {}
    grams: dict[Layers, Tensor] = {}
    last_shape = None
    for layers, shape in track(jobs):
        if shape != last_shape:
            grams, last_shape = {}, shape
        cells = _cells(layers, shape, jobs)
        for cell in cells:
            if cell not in grams:
                grams[cell] = gram([convs[name].weight for name in cell], Settings(shape, 1))
        eigenvalues = torch.linalg.eigvalsh(sum(grams[cell] for cell in cells)).clamp(min=0)
        spectra[layers, shape] = (eigenvalues.cumsum(0) - eigenvalues).flip(0)
    return spectra


def _cells(layers: Layers, shape: Shape, jobs: Sequence[tuple[Layers, Shape]]) -> list[Layers]:
    """Divide layers into groups that occur in the same jobs, so that each Gram matrix is computed once."""
    sets = [set(others) for others, other_shape in jobs if other_shape == shape]
    cells = defaultdict(list)
    for name in layers:
        cells[tuple(name in each for each in sets)].append(name)
    return [tuple(cell) for cell in cells.values()]


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
    """Return the longest code with which every layer stores less than dense."""
    return min((conv.weight.numel() - 1) // math.prod(grid(conv.weight.shape, shape)) for conv in convs.values())


def _choice(convs: Convs, slice_shape: Shape, code_dim: int) -> Choice:
    weights = [conv.weight for conv in convs.values()]
    slices = sum(math.prod(grid(weight.shape, slice_shape)) for weight in weights)
    shapes = tuple(tuple(weight.shape) for weight in weights)
    return Choice(tuple(convs), shapes, slice_shape, code_dim, slices, sum(weight.numel() for weight in weights))
