"""Compare ways to fit one linear generator to a trained classifier, by errors and by accuracy."""

import re
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any, cast

import torch
from mmengine.config import Config
from mmengine.runner import Runner
from mmpretrain.models import ImageClassifier
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from csg_seg.errors import CSGError
from csg_seg.files import check_folder, write_tensors
from csg_seg.generators.settings import Settings
from csg_seg.mm.plan_files import build_dense
from csg_seg.report import summarise
from csg_seg.retrofitting.selection import choose_layers
from csg_seg.retrofitting.surgery import retrofit
from csg_seg.retrofitting.weights import fit
from experiments.carry_over.ways import FEATURES, taught_from
from experiments.runs.runner import train_and_test

from .methods import FITS, Layer, Layers, fit_by, output_energies

# Relative error due to float32.
EXACT = 1e-4


def compare_fits(
    cfg: Config,
    checkpoint: str,
    texts: Sequence[str],
    *,
    images: int,
    folder: str | Path | None = None,
    track: Callable = iter,
) -> dict[str, Any]:
    """Fit a trained classifier in all ways and measure errors and accuracy.

    Args:
        cfg: its dense config.
        checkpoint: its weights.
        texts: settings, as for :func:`read_settings`.
        images: number of calibration images from the train split, not augmented.
        folder: folder for the fitted networks, for :func:`train_from_fits`.
        track: wraps the sequence of fits, to show progress.

    Returns:
        JSON-ready: test accuracy of the dense network; for each setting its parameter
        counts and, for each way, ``weight_error`` and ``output_error`` (relative, mean
        over layers, outputs for dense inputs), ``accuracy``, and ``accuracy_bn`` after
        recomputing BatchNorm statistics on the calibration images.

    Raises:
        CSGError: a setting, the number of images or the network is unsuitable.
    """
    cfg = deepcopy(cfg)
    if folder is not None:
        check_folder(folder, given=f'--work-dir {folder}')
    network = _build_classifier(cfg, checkpoint)
    calibration = _calibration(cfg, network, images)
    given = {text: read_settings(text, network) for text in texts}
    tests = Runner.build_dataloader(cfg.test_dataloader)
    moments = input_moments(network, calibration)
    dense = {'accuracy': accuracy(network, tests), 'accuracy_bn': accuracy(renormalised(network, calibration), tests)}
    found = {text: {**_counts(network, csg), **csg, 'ways': {}} for text, csg in given.items()}
    for text, way in track([(text, way) for text in texts for way in FITS]):
        settings = Settings.from_dict(given[text])
        layers = read_layers(network, list(choose_layers(network, [settings])[0]), moments)
        fitted = fit_by(way, layers, settings)
        twin = with_weights(network, fitted)
        found[text]['ways'][way] = {
            'weight_error': statistics.fmean(weight_error(fitted[name], layer) for name, layer in layers.items()),
            'output_error': statistics.fmean(output_error(fitted[name], layer) for name, layer in layers.items()),
            'accuracy': accuracy(twin, tests),
            'accuracy_bn': accuracy(renormalised(twin, calibration), tests),
        }
        if folder is not None:
            write_tensors(_start(folder, text, way), {'state_dict': twin.state_dict()})
    return {'dense': dense, 'settings': found}


def train_from_fits(
    cfg: Config,
    checkpoint: str,
    result: dict[str, Any],
    ways: Sequence[str],
    folder: str | Path,
    *,
    layers: Sequence[str],
    **options: Any,
) -> None:
    """Train from fits, with the dense network as teacher, and add ``accuracy_trained`` to the result.

    Args:
        cfg: the dense network's config, with the schedule.
        checkpoint: its weights.
        result: result of :func:`compare_fits`.
        ways: keys of :data:`experiments.fits.methods.FITS` whose weights one generator can
            reproduce: without permutation or scale, and without overhang.
        folder: the folder given to :func:`compare_fits`; it gets the runs too.
        layers: layers whose outputs are compared, see :class:`csg_seg.mm.teacher.ConfiguredTeacher`.
        options: options of :func:`experiments.runs.runner.train_and_test`.

    Raises:
        CSGError: training would start from other weights than a way's, or a run failed.
    """
    teacher = {'checkpoint': str(Path(checkpoint).resolve()), **FEATURES, 'layers': list(layers)}
    configs = {}
    for text, found in result['settings'].items():
        csg = {key: found[key] for key in ('slice_shape', 'code_dim')}
        for way in ways:
            start = _start(folder, text, way).resolve()
            _check_start(cfg, start, csg, f'{text} {way}')
            configs[f'{text} {way}'] = taught_from(start, cfg, [csg], teacher)
    trained = train_and_test(configs, [0], Path(folder, 'runs'), **options)['networks']
    for text, found in result['settings'].items():
        for way in ways:
            found['ways'][way]['accuracy_trained'] = trained[f'{text} {way}']['mean']


def _check_start(cfg: Config, start: Path, csg: Mapping[str, Any], name: str) -> None:
    """Check that a generator fitted to the start reproduces it."""
    network = build_dense(cfg, start)
    worst = max(fit(retrofit(deepcopy(network), csg), network.state_dict()).values())
    if worst > EXACT:
        raise CSGError(
            f'{name}: no generator with these settings makes these weights (relative error {worst:.3f}), so training '
            'would start elsewhere; leave it out of --train'
        )


def check_ways(ways: Iterable[str]) -> None:
    """Check that all ways exist.

    Raises:
        CSGError: one does not.
    """
    for way in ways:
        if way not in FITS:
            raise CSGError(f'there is no way {way!r}; choose from {", ".join(map(repr, FITS))}')


def _start(folder: str | Path, text: str, way: str) -> Path:
    return Path(folder, 'fits', f'{text} {way}.pth')


def _build_classifier(cfg: Config, checkpoint: str) -> nn.Module:
    if cfg.get('data_preprocessor'):  # as a Runner does
        cfg.model.setdefault('data_preprocessor', cfg.data_preprocessor)
    network = build_dense(cfg, checkpoint).eval()
    if not isinstance(network, ImageClassifier):
        raise CSGError(f'fits are compared by accuracy; {type(network).__name__} is not an ImageClassifier')
    return network


def read_settings(text: str, network: nn.Module) -> dict[str, Any]:
    """Read settings such as 's12-d72' or 's8x16-2.3x': 3x3 slices, and a code length or a compression ratio.

    Raises:
        CSGError: the text has another form, or the ratio is out of reach.
    """
    found = re.fullmatch(r's(\d+)(?:x(\d+))?-(?:d(\d+)|(\d+(?:\.\d+)?)x)', text)
    if found is None:
        raise CSGError(f'{text!r}: write settings as s12-d72 or s8x16-2.3x')
    s_out, s_in, length, ratio = found.groups()
    csg: dict[str, Any] = {'slice_shape': [int(s_out), int(s_in or s_out), 3, 3]}
    if length is not None:
        return {**csg, 'code_dim': int(length)}
    if float(ratio) <= 1:
        raise CSGError(f'{text}: a compression must be above 1, dense over stored parameters')
    one, two = (_counts(network, {**csg, 'code_dim': length}) for length in (1, 2))
    budget = int(one['dense_params'] / float(ratio))
    longest = (budget - one['stored_params']) // (two['stored_params'] - one['stored_params']) + 1
    if longest < 1:
        raise CSGError(f'{text}: {ratio}x is out of reach; codes of length 1 give {one["compression_ratio"]:.1f}x')
    return {**csg, 'code_dim': longest}


def _counts(network: nn.Module, csg: Mapping[str, Any]) -> dict[str, Any]:
    summary = summarise(retrofit(deepcopy(network), csg))
    keys = ('dense_params', 'stored_params', 'compression_ratio')
    return {key: getattr(summary, key) for key in keys}


def read_layers(network: nn.Module, names: list[str], moments: Mapping[str, Tensor]) -> Layers:
    """Return what the ways need to know of the named convs.

    Raises:
        CSGError: a layer's outputs are all zero.
    """
    layers = {}
    for name in names:
        weight = network.state_dict()[f'{name}.weight'].double()
        layers[name] = Layer(weight, moments[name].double(), _reader(network, name))
        if not output_energies(weight, layers[name]).any():
            raise CSGError(f'{name} is zero for all images; use a checkpoint of a trained network')
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
    """Return the relative error of a layer's outputs for the inputs that it gets in the dense network."""
    left = output_energies(layer.weight - fitted, layer).sum()
    return (left / output_energies(layer.weight, layer).sum()).sqrt().item()


@torch.no_grad()
def input_moments(network: nn.Module, batches: list[Tensor]) -> dict[str, Tensor]:
    """Return :attr:`Layer.moments` of every ungrouped conv, by name."""
    totals: dict[str, Tensor] = {}
    counts: dict[str, int] = {}

    def gather(name: str) -> Callable:
        def hook(conv: nn.Conv2d, inputs: tuple[Tensor]) -> None:
            padding = cast(tuple[int, ...], conv.padding)
            # One image at a time: patches take nine times the memory of the input.
            for image in inputs[0]:
                patches = F.unfold(image[None], conv.kernel_size, conv.dilation, padding, conv.stride)[0]
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
    """Return a copy with BatchNorm statistics of the given images, computed as PreciseBN does."""
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
def accuracy(network: Any, loader: Any) -> float:
    """Return top-1 accuracy in percent."""
    samples = [sample for batch in loader for sample in network.test_step(batch)]
    right = sum(bool((sample.pred_label == sample.gt_label).all()) for sample in samples)
    return 100 * right / len(samples)


def _calibration(cfg: Config, network: Any, images: int) -> list[Tensor]:
    """Return batches of train images through the test pipeline, drawn with seed 0."""
    if images < 1:
        raise CSGError(f'--images {images}: fits need calibration images; give at least 1')
    loader = deepcopy(cfg.train_dataloader)
    loader.dataset.pipeline = cfg.test_dataloader.dataset.pipeline
    loader.update(batch_size=min(images, 100), sampler=dict(type='DefaultSampler', shuffle=False))
    found = len(Runner.build_dataloader(deepcopy(loader)).dataset)
    if images > found:
        raise CSGError(f'--images {images}: the train split has {found}; give at most as many')
    loader.dataset.indices = torch.randperm(found, generator=torch.Generator().manual_seed(0))[:images].tolist()
    return [network.data_preprocessor(batch)['inputs'] for batch in Runner.build_dataloader(loader)]
