"""Ways to fit one linear generator to trained weights, compared: that of csg_seg.fit, and others beside it.

All of them store the same: a way only decides which error is made small. A scale for
each slice is not among them, because a code absorbs it; one for each filter is, which
the BatchNorm behind a conv absorbs. Weights are in float64, as in :mod:`csg_seg.fit`.
"""

import math
import re
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from mmengine.config import Config
from mmengine.runner import Runner
from mmpretrain.models import ImageClassifier
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from ..errors import CSGError
from ..fit import fit_generator, gram
from ..generator import build_generator
from ..report import Summary, summarise
from ..retrofit import choose_layers, retrofit
from ..settings import Settings
from ..slices import join, split
from .plan import build_dense

ROUNDS = 5
# Of conjugate gradients, in each round; they go on from the round before.
STEPS = 5
# Added to the moments, in parts of their mean: a channel that is always zero must not get any weight at all.
RIDGE = 1e-3


@dataclass(frozen=True)
class Layer:
    """What a way may know of a layer.

    Attributes:
        weight: ``(out, in, kh, kw)``, dense.
        moments: ``(in * kh * kw, in * kh * kw)``, mean outer product of the input's patches.
        reader: name of the only other layer that reads its outputs and may see them in another order.
    """

    weight: Tensor
    moments: Tensor
    reader: str | None = None


Layers = Mapping[str, Layer]
Weights = dict[str, Tensor]
Fit = Callable[[Layers, Settings], Weights]
Map = Callable[[Tensor], Tensor]


# --- which error is made small ---


def with_zeros(layers: Layers, settings: Settings) -> Weights:
    """Truncated SVD of all slices; what hangs over a weight's edge counts as zeros to be met."""
    basis = _truncated_svd(layers, settings)
    fitted = {}
    for name, layer in layers.items():
        slices = split(layer.weight, settings.slice_shape).flatten(1)
        codes = slices @ basis.T
        fitted[name] = join((codes @ basis).unflatten(1, settings.slice_shape), layer.weight.shape)
    return fitted


def with_free_overhang(layers: Layers, settings: Settings) -> Weights:
    """Alternating least squares from the truncated SVD on, free where slices hang over: ``csg_seg.fit`` as it is."""
    generator = build_generator(settings, torch.Generator().manual_seed(settings.seed)).double()
    codes = fit_generator(generator, [layer.weight for layer in layers.values()])
    with torch.no_grad():
        slices = [generator(code) for code in codes]
    return {name: join(made, layers[name].weight.shape) for name, made in zip(layers, slices, strict=True)}


def with_input_energies(layers: Layers, settings: Settings) -> Weights:
    """Weigh each weight's error by its input channel's mean square, each layer by its output's; overhang is free."""
    diagonal = {}
    for name, layer in layers.items():
        kernel = math.prod(layer.weight.shape[2:])
        energies = layer.moments.diagonal().unflatten(0, (-1, kernel)).mean(1)
        diagonal[name] = replace(layer, moments=energies.repeat_interleave(kernel).diag())
    return with_input_moments(diagonal, settings)


def with_input_moments(layers: Layers, settings: Settings) -> Weights:
    """Make the relative error of outputs small, as far as the channels of one slice add up to it; overhang is free.

    What two slices of a row add to the same output counts as if it were uncorrelated.
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
    """Put hidden channels in the order that makes slices alike, then fit with free overhang.

    The channels between two convs that only norm and activation lie between may come
    in any order. Start: by norm. Then in turn a truncated SVD, and for each pair of
    convs the assignment of channels to places that comes nearest to what it made.
    """
    dense = {name: layer.weight for name, layer in layers.items()}
    pairs = [name for name, layer in layers.items() if layer.reader in layers]
    orders = {name: _hidden_channels(layers, name, dense).norm(dim=1).argsort() for name in pairs}
    for _ in range(ROUNDS):
        made = with_zeros(_permuted(layers, orders), settings)
        orders = {name: _assign(layers, name, made) for name in orders}
    made = with_free_overhang(_permuted(layers, orders), settings)
    # Back in the old order, the network computes the same.
    back = {name: order.argsort() for name, order in orders.items()}
    fitted = {name: replace(layers[name], weight=weight) for name, weight in made.items()}
    return {name: layer.weight for name, layer in _permuted(fitted, back).items()}


# --- what layers or filters are scaled to first; the way back is exact ---

Scaled = tuple[Layers, dict[str, Tensor]]


def as_they_are(layers: Layers) -> Scaled:
    """Scale nothing: large weights count most."""
    return _scaled(layers, lambda layer: torch.ones((), dtype=torch.float64))


def at_unit_norm(layers: Layers) -> Scaled:
    """Scale each layer to norm 1, which its codes absorb: relative errors count, all layers alike."""
    return _scaled(layers, lambda layer: layer.weight.norm())


def at_unit_mean_square(layers: Layers) -> Scaled:
    """Scale each layer to mean square 1, which its codes absorb: relative errors count, layers by their size."""
    return _scaled(layers, lambda layer: layer.weight.square().mean().sqrt())


def with_unit_filters(layers: Layers) -> Scaled:
    """Scale each filter to norm 1, which the BatchNorm behind it absorbs."""
    return _scaled(layers, lambda layer: layer.weight.flatten(1).norm(dim=1).view(-1, 1, 1, 1))


def with_unit_outputs(layers: Layers) -> Scaled:
    """Scale each filter to an output of mean square 1, which the BatchNorm behind it absorbs."""
    return _scaled(layers, lambda layer: _output_energies(layer.weight, layer).sqrt().view(-1, 1, 1, 1))


WAYS: dict[str, tuple[Callable[[Layers], Scaled], Fit]] = {
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
    """Return the weight of each layer that one of :data:`WAYS` fits."""
    scale, fit = WAYS[way]
    scaled, factors = scale(layers)
    return {name: weight * factors[name] for name, weight in fit(scaled, settings).items()}


# --- measuring ---


def compare_fits(
    cfg: Config, checkpoint: str, texts: Sequence[str], *, images: int, track: Callable = iter
) -> dict[str, Any]:
    """Fit a trained classifier in all ways and say what is left of it.

    Args:
        cfg: its dense config.
        checkpoint: its weights.
        texts: settings, as for :func:`read_settings`.
        images: of the train split, without augmentation, to calibrate on.
        track: wraps the sequence of fits, to show progress.

    Returns:
        JSON-ready: test accuracy of the dense network, and for each setting what it
        stores and, for each way, ``weight_error`` and ``output_error`` (relative, mean
        over layers, outputs for dense inputs), ``accuracy``, and ``accuracy_bn`` after
        the statistics of BatchNorm are taken again from the calibration images.

    Raises:
        CSGError: a setting, the number of images or the network does not do.
    """
    network = _build_classifier(cfg, checkpoint)
    calibration = _calibration(cfg, network, images)
    given = {text: read_settings(text, network) for text in texts}
    tests = Runner.build_dataloader(cfg.test_dataloader)
    moments = input_moments(network, calibration)
    dense = {'accuracy': accuracy(network, tests), 'accuracy_bn': accuracy(renormalised(network, calibration), tests)}
    ways: dict[str, dict[str, Any]] = {text: {} for text in texts}
    for text, way in track([(text, way) for text in texts for way in WAYS]):
        settings = Settings.from_dict(given[text])
        layers = read_layers(network, list(choose_layers(network, [settings])[0]), moments)
        fitted = fit_by(way, layers, settings)
        twin = with_weights(network, fitted)
        ways[text][way] = {
            'weight_error': statistics.fmean(weight_error(fitted[name], layer) for name, layer in layers.items()),
            'output_error': statistics.fmean(output_error(fitted[name], layer) for name, layer in layers.items()),
            'accuracy': accuracy(twin, tests),
            'accuracy_bn': accuracy(renormalised(twin, calibration), tests),
        }
    counts = {text: _count(network, csg) for text, csg in given.items()}
    stored = {
        text: {'stored_params': each.stored_params, 'compression_ratio': each.compression_ratio, **given[text]}
        for text, each in counts.items()
    }
    return {'dense': dense, 'settings': {text: {**stored[text], 'ways': ways[text]} for text in texts}}


def _build_classifier(cfg: Config, checkpoint: str) -> nn.Module:
    if cfg.get('data_preprocessor'):  # as a Runner does
        cfg.model.setdefault('data_preprocessor', cfg.data_preprocessor)
    network = build_dense(cfg, checkpoint).eval()
    if not isinstance(network, ImageClassifier):
        raise CSGError(f'fits are compared by accuracy, and {type(network).__name__} is no ImageClassifier')
    for name, tensor in network.state_dict().items():
        if not tensor.isfinite().all():
            raise CSGError(f'{name} holds NaN or infinite values; take a checkpoint from before training diverged')
    return network


def read_settings(text: str, network: nn.Module) -> dict[str, Any]:
    """Read settings such as 's12-d72' or 's8x16-2.3x': slices of 3x3, and a code length or a compression ratio.

    Raises:
        CSGError: it is not so written, or the ratio is out of reach.
    """
    found = re.fullmatch(r's(\d+)(?:x(\d+))?-(?:d(\d+)|(\d+(?:\.\d+)?)x)', text)
    if found is None:
        raise CSGError(f'{text!r} are no settings; write them as s12-d72, or as s8x16-2.3x')
    s_out, s_in, length, ratio = found.groups()
    csg: dict[str, Any] = {'slice_shape': [int(s_out), int(s_in or s_out), 3, 3]}
    if length is not None:
        return {**csg, 'code_dim': int(length)}
    if float(ratio) <= 1:
        raise CSGError(f'{text}: a compression must be above 1, dense over stored parameters')
    one, two = (_count(network, {**csg, 'code_dim': length}) for length in (1, 2))
    budget = int(one.dense_params / float(ratio))
    longest = (budget - one.stored_params) // (two.stored_params - one.stored_params) + 1
    if longest < 1:
        raise CSGError(f'{text}: {ratio}x is out of reach; codes of length 1 give {one.compression_ratio:.1f}x')
    return {**csg, 'code_dim': longest}


def _count(network: nn.Module, csg: Mapping[str, Any]) -> Summary:
    return summarise(retrofit(deepcopy(network), csg))


def read_layers(network: nn.Module, names: list[str], moments: Mapping[str, Tensor]) -> Layers:
    """Gather what the ways need of the named convs.

    Raises:
        CSGError: a layer's outputs are all zero.
    """
    layers = {}
    for name in names:
        weight = network.get_submodule(name).weight.detach().double()
        layers[name] = Layer(weight, moments[name].double(), _reader(network, name))
        if not _output_energies(weight, layers[name]).any():
            raise CSGError(f'{name} gives zero for all images; take a checkpoint of a network that is trained')
    return layers


def _reader(network: nn.Module, name: str) -> str | None:
    """Return the second conv of a basic block, ``conv1, bn1, relu, conv2, bn2``, if this is its first."""
    block, _, conv = name.rpartition('.')
    children = dict(network.get_submodule(block).named_children())
    names = list(children)
    if conv != 'conv1' or 'conv2' not in names or 'conv3' in names:
        return None
    between = [children[each] for each in names[names.index('conv1') + 1 : names.index('conv2')]]
    is_basic = between and all(isinstance(each, (_BatchNorm, nn.ReLU)) for each in between)
    return f'{block}.conv2' if is_basic else None


def weight_error(fitted: Tensor, layer: Layer) -> float:
    """Return ``norm(W - W') / norm(W)``."""
    return ((layer.weight - fitted).norm() / layer.weight.norm()).item()


def output_error(fitted: Tensor, layer: Layer) -> float:
    """Return the relative error of a layer's outputs, its inputs being those of the dense network."""
    left = _output_energies(layer.weight - fitted, layer).sum()
    return (left / _output_energies(layer.weight, layer).sum()).sqrt().item()


@torch.no_grad()
def input_moments(network: nn.Module, batches: list[Tensor]) -> dict[str, Tensor]:
    """Return :attr:`Layer.moments` of every ungrouped conv, by name."""
    totals: dict[str, Tensor] = {}
    counts: dict[str, int] = {}

    def gather(name: str) -> Callable:
        def hook(conv: nn.Conv2d, inputs: tuple[Tensor]) -> None:
            # One image at a time: all patches at once take nine times the memory of the input.
            for image in inputs[0]:
                patches = F.unfold(image[None], conv.kernel_size, conv.dilation, conv.padding, conv.stride)[0]
                totals[name] = totals.get(name, 0) + patches @ patches.T
                counts[name] = counts.get(name, 0) + patches.shape[1]

        return hook

    convs = {name: each for name, each in network.named_modules() if isinstance(each, nn.Conv2d) and each.groups == 1}
    handles = [conv.register_forward_pre_hook(gather(name)) for name, conv in convs.items()]
    for batch in batches:
        network(batch, mode='tensor')
    for handle in handles:
        handle.remove()
    return {name: total / counts[name] for name, total in totals.items()}


def with_weights(network: nn.Module, weights: Mapping[str, Tensor]) -> nn.Module:
    """Return a copy of a network with other weights in the named convs."""
    twin = deepcopy(network)
    with torch.no_grad():
        for name, weight in weights.items():
            cast(nn.Conv2d, twin.get_submodule(name)).weight.copy_(weight)
    return twin


@torch.no_grad()
def renormalised(network: nn.Module, batches: list[Tensor]) -> nn.Module:
    """Return a copy whose BatchNorm statistics are those of the given images, as PreciseBN takes them."""
    twin = deepcopy(network).eval()
    for module in twin.modules():
        if isinstance(module, _BatchNorm):
            module.reset_running_stats()
            module.momentum = None  # a plain mean over batches
            module.train()
    for batch in batches:
        twin(batch, mode='tensor')
    return twin.eval()


@torch.no_grad()
def accuracy(network: nn.Module, loader: Any) -> float:
    """Return top-1 accuracy in percent."""
    samples = [sample for batch in loader for sample in network.test_step(batch)]
    right = sum(bool((sample.pred_label == sample.gt_label).all()) for sample in samples)
    return 100 * right / len(samples)


def _calibration(cfg: Config, network: nn.Module, images: int) -> list[Tensor]:
    """Return batches of train images as the test pipeline gives them, drawn by seed 0."""
    if images < 1:
        raise CSGError(f'--images {images}: fits are weighed by what layers see of train images; give at least 1')
    loader = deepcopy(cfg.train_dataloader)
    loader.dataset.pipeline = cfg.test_dataloader.dataset.pipeline
    loader.update(batch_size=min(images, 100), sampler=dict(type='DefaultSampler', shuffle=False))
    found = len(Runner.build_dataloader(deepcopy(loader)).dataset)
    if images > found:
        raise CSGError(f'--images {images}: the train split has {found}; give at most as many')
    loader.dataset.indices = torch.randperm(found, generator=torch.Generator().manual_seed(0))[:images].tolist()
    return [network.data_preprocessor(batch)['inputs'] for batch in Runner.build_dataloader(loader)]


# --- least squares over outputs ---


@dataclass(frozen=True)
class _Group:
    """Slices of a layer that read the same inputs and are cropped alike, one below the other.

    Attributes:
        rows: of the layer's weight that they fill.
        columns: likewise, in input channels.
        target: ``(n, kept_out, kept_in * kh * kw)``, what they should be.
        moments: of their inputs, over the energy of the layer's outputs.
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
        moments = (layer.moments + ridge) / _output_energies(layer.weight, layer).sum()
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
    """Return the codes ``(n, code_dim)`` that are best for a basis ``(code_dim, s_out, s_in * kh * kw)``."""
    kept = group.kept(basis)
    weighed = (kept @ group.moments).flatten(1)
    # A cropped slice may have fewer values than a code.
    inverse = torch.linalg.pinv(weighed @ kept.flatten(1).T, hermitian=True)
    return group.target.flatten(1) @ weighed.T @ inverse


def _improve(basis: Tensor, groups: Sequence[_Group], codes: Sequence[Tensor]) -> Tensor:
    """Bring a basis nearer to the best for given codes, by conjugate gradients.

    Preconditioned by the inverse of all codes' second moments on one side, of all inputs' on the other.
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
    """Go :data:`STEPS` steps towards the ``x`` for which ``apply(x)`` is what is wanted."""
    residual = wanted - apply(start)
    direction = steepest = precondition(residual)
    size = (residual * steepest).sum()
    for _ in range(STEPS):
        if size == 0:  # it is there
            break
        change = apply(direction)
        length = size / (direction * change).sum()
        start, residual = start + length * direction, residual - length * change
        steepest = precondition(residual)
        size, before = (residual * steepest).sum(), size
        direction = steepest + size / before * direction
    return start


# --- small parts ---


def _truncated_svd(layers: Layers, settings: Settings) -> Tensor:
    """Return orthonormal rows ``(code_dim, size)``."""
    total = gram([layer.weight for layer in layers.values()], settings)
    return torch.linalg.eigh(total).eigenvectors[:, -settings.code_dim :].T


def _output_energies(weight: Tensor, layer: Layer) -> Tensor:
    """Return the mean square ``(out,)`` of each channel that a weight makes of a layer's inputs."""
    filters = weight.flatten(1)
    return ((filters @ layer.moments) * filters).sum(1)


def _scaled(layers: Layers, measure: Callable[[Layer], Tensor]) -> Scaled:
    factors = {name: measure(layer) for name, layer in layers.items()}
    factors = {name: torch.where(factor > 0, factor, 1.0) for name, factor in factors.items()}
    scaled = {name: replace(layer, weight=layer.weight / factors[name]) for name, layer in layers.items()}
    return scaled, factors


def _permuted(layers: Layers, orders: Mapping[str, Tensor]) -> Layers:
    """Put hidden channels in another order, in the weights of both convs; moments stay as they are."""
    permuted = dict(layers)
    for name, order in orders.items():
        reader = cast(str, layers[name].reader)
        permuted[name] = replace(permuted[name], weight=permuted[name].weight[order])
        permuted[reader] = replace(permuted[reader], weight=permuted[reader].weight[:, order])
    return permuted


def _hidden_channels(layers: Layers, name: str, weights: Weights) -> Tensor:
    """Return ``(channels, values)``: the filter of each hidden channel, and what the next layer makes of it."""
    reader = cast(str, layers[name].reader)
    return torch.cat([weights[name].flatten(1), weights[reader].transpose(0, 1).flatten(1)], dim=1)


def _assign(layers: Layers, name: str, made: Weights) -> Tensor:
    """Return the order of hidden channels that comes nearest to the weights that were made."""
    dense = {each: layer.weight for each, layer in layers.items()}
    channels, places = (_hidden_channels(layers, name, weights) for weights in (dense, made))
    channel, place = linear_sum_assignment(torch.cdist(channels, places).square().numpy())
    order = torch.empty(len(channels), dtype=torch.long)
    order[torch.from_numpy(place)] = torch.from_numpy(channel)
    return order
