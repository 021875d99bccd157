"""The check of one network: a generator for each kernel size; train, store, materialise and load."""

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from copy import deepcopy
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast

import torch
from mmengine.config import Config
from mmengine.logging import MessageHub
from mmengine.registry import MODELS, init_default_scope
from mmpretrain.structures import DataSample
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from csg_seg.errors import CSGError
from csg_seg.generators.settings import Settings
from csg_seg.layers.bank import bank_of
from csg_seg.layers.conv import find_convs, generated_convs
from csg_seg.mm.model import retrofit_for_runner
from csg_seg.report import summarise
from csg_seg.retrofitting.selection import Cause, Reason, generable, not_generable, reason_to_skip
from csg_seg.retrofitting.surgery import materialise
from csg_seg.running.processes import replace_sync_bn
from csg_seg.storage.builders import Source, build
from csg_seg.storage.compact import load_compact, save_compact
from experiments.batches import random_batch

# Smallest first, except LeNet's; some networks accept only one size.
SIZES = (64, 128, 160, 224, 256, 336, 384, 448, 512, 640, 32)
FRAMES = 16
SIZES_3D = (32, 64, 96)
RATIO = 9


def check_network(scope: str, spec: Any) -> dict[str, Any]:
    """Retrofit a network with a generator for each kernel size, and check that everything works.

    Args:
        scope: library of the network.
        spec: a value of :func:`experiments.zoo.libraries.list_networks`.

    Returns:
        JSON-ready: ``result``: 'pass', 'no conv', 'refused', 'not run dense' or 'fail'; ``reason``, empty for
        'pass'. For 'pass' and 'no conv', ``left_dense``, the number of convs for each reason. For 'pass',
        ``trains_on``: 'losses' or 'outputs'; ``generated``, the number of generated convs; and ``ratio``.
    """
    if isinstance(spec, UnreadError):
        return {'result': 'not run dense', 'reason': str(spec)}
    sketch = _sketch(scope, spec)
    if sketch is not None and not settings_for(sketch):
        return _no_conv(sketch)
    torch.manual_seed(0)
    try:
        model = _build(scope, spec)
        csg = settings_for(model)
        if not csg:
            return _no_conv(model)
        run, run_loss = _runs(model)
        used = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
        model.zero_grad()
    except Exception as error:  # the network may fail in any way without csg_seg too
        return {'result': 'not run dense', 'reason': one_line(error)}
    keys = list(model.state_dict())
    try:
        retrofit_for_runner(model, csg)
    except CSGError as error:
        return {'result': 'refused', 'reason': str(error)}
    summary = summarise(model)
    # settings_for leaves out a kernel size whose convs all cost more generated.
    causes = [each.cause for each in cast(dict[str, Reason], bank_of(model).left_dense).values()]
    causes = [Cause.COSTS_MORE if cause is Cause.OTHER_KERNEL else cause for cause in causes]
    try:
        source = spec if isinstance(spec, Mapping) and 'builder' in spec else None
        problem = _gradient_problem(model, run_loss, used) or _storage_problem(model, run, keys, source)
    except Exception as error:
        problem = one_line(error)
    if problem is not None:
        return {'result': 'fail', 'reason': problem}
    return {
        'result': 'pass',
        'reason': '',
        'trains_on': 'outputs' if run_loss is run else 'losses',
        'generated': sum(layer.generator is not None for layer in summary.layers),
        'ratio': round(summary.compression_ratio, 2),
        'left_dense': _count(causes),
    }


def _no_conv(model: nn.Module) -> dict[str, Any]:
    reasons = not_generable(model)
    names = {**find_convs(model), **reasons}
    causes = [reasons[name].cause if name in reasons else Cause.COSTS_MORE for name in names]
    reason = 'it has no conv that could be generated and would cost less so'
    return {'result': 'no conv', 'reason': reason, 'left_dense': _count(causes)}


def _count(causes: Iterable[Cause]) -> dict[str, int]:
    return dict(Counter(cause.value for cause in causes))


def settings_for(model: nn.Module) -> list[dict[str, Any]]:
    """Return a dict of settings for each kernel size, and each width of narrow groups, that shrinks convs.

    Args:
        model: dense network.
    """
    waiting = generable(model)
    sizes: Counter[tuple[int, ...]] = Counter()
    for conv in waiting.values():
        sizes[conv.kernel_size] += conv.weight.numel()
    shapes = {_slice_shape(conv, sizes[conv.kernel_size]) for conv in waiting.values()}
    csg = []
    # Wide slices first: narrow groups are left to the next dict.
    for slice_shape in sorted(shapes, reverse=True):
        settings = Settings(slice_shape=slice_shape, code_dim=max(1, math.prod(slice_shape) // RATIO))
        left = {name: conv for name, conv in waiting.items() if reason_to_skip(name, conv, settings, is_first=False)}
        if len(left) < len(waiting):
            csg.append(dict(slice_shape=slice_shape, code_dim=settings.code_dim))
        waiting = left
    return csg


def _slice_shape(conv: _ConvNd, numel: int) -> tuple[int, ...]:
    """Return the largest slices whose generator has at most a quarter of the weights of the conv's kernel size."""
    for side in (8, 4):
        width = min(side, conv.weight.shape[1]) if conv.groups > 1 else side
        size = side * width * math.prod(conv.kernel_size)
        if size * (size // RATIO) <= numel / 4:
            break
    return side, width, *conv.kernel_size


class UnreadError(Exception):
    """Takes the place of a network whose config cannot be read."""


def one_line(error: BaseException) -> str:
    """Return the type of an error and the start of its message, without paths of this machine."""
    said = re.sub(r'(?<![\w.])(/[\w.@-]+){2,}', '...', ' '.join(str(error).split()))
    return f'{type(error).__name__}: {said[:200]}'


def _build(scope: str, spec: Any) -> nn.Module:
    if scope == 'torchvision':
        models = import_module('torchvision.models')
        try:
            model = models.get_model(spec, weights=None, weights_backbone=None)
        except TypeError:
            return models.get_model(spec, weights=None)
        if hasattr(getattr(model, 'transform', None), 'min_size'):
            model.transform.min_size = SIZES[:1]  # otherwise it enlarges the images
        return model
    if scope == 'timm':
        return import_module('timm').create_model(spec, pretrained=False)
    if 'builder' in spec:
        return build(spec)
    init_default_scope(scope)
    MessageHub.get_current_instance().update_info('max_iters', 1)  # momentum encoders need it
    model = Config({'model': deepcopy(spec)}).model  # some networks read its parts as attributes
    replace_sync_bn(model)
    return MODELS.build(model)


def _sketch(scope: str, spec: Any) -> nn.Module | None:
    """Return the network on the meta device, or None if it cannot be built there."""
    try:
        with torch.device('meta'):
            return _build(scope, spec)
    except Exception:  # it computes with its weights during construction
        return None


Run = Callable[[nn.Module], list[Tensor]]
Call = Callable[[nn.Module, Tensor], Any]


def _runs(model: nn.Module) -> tuple[Run, Run]:
    """Return functions that run and train a network on the smallest input that it accepts.

    Afterwards, the network has the gradients of a step.
    """
    first: Exception | None = None
    in_training: Exception | None = None
    dimensions = _dimensions(model)
    for size in SIZES_3D if dimensions == 3 else SIZES:
        images = _images(model, size, dimensions)
        for call in _calls(model):

            def run(network: nn.Module, images: Tensor = images, call: Call = call) -> list[Tensor]:
                torch.manual_seed(0)  # some heads draw random numbers
                return _floats(call(network, images if network.training else images[:1]))

            try:
                with torch.no_grad():
                    run(model.eval())
            except Exception as error:
                first = first or error
                continue
            try:
                return run, _loss_run(model, run, images)
            except Exception as error:
                in_training = error
    raise in_training or first or ValueError('it accepts no input')


def _calls(model: nn.Module) -> Iterator[Call]:
    """Yield ways to pass images: a batch, a list, a pair, a video."""
    if hasattr(model, 'data_preprocessor'):
        yield lambda network, images: network(images, mode='tensor')
        return
    yield lambda network, images: network(images)
    library = _library(model)
    if library == 'monai':
        yield lambda network, images: network(images[:, None])  # a bag of patches
    if library == 'transformers':
        yield lambda network, images: network(images, torch.zeros(len(images), 77))  # OneFormer's task
    if library != 'torchvision':
        return
    yield lambda network, images: network(list(images))
    yield lambda network, images: network(images, images)
    yield lambda network, images: network(images[:, :, None].expand(-1, -1, FRAMES, -1, -1))


def _library(model: nn.Module) -> str:
    return type(model).__module__.split('.')[0]


def _images(model: nn.Module, size: int, dimensions: int) -> Tensor:
    """Return two images, grey if the first conv has one input channel, in colour otherwise."""
    first = next(iter(find_convs(model).values()), None)
    channels = 1 if first is not None and first.in_channels == 1 else 3
    return torch.randn(2, channels, *[size] * dimensions, generator=torch.Generator().manual_seed(0))


def _dimensions(model: nn.Module) -> int:
    """Return the dimensions of a network's images: those of a MONAI network's convs, and 2 elsewhere."""
    first = next(iter(find_convs(model).values()), None)
    return 2 if first is None or _library(model) != 'monai' else len(first.kernel_size)


def _loss_run(model: nn.Module, run: Run, images: Tensor) -> Run:
    """Train a step on losses, or on outputs if losses are not available; return the function that runs it."""
    size = images.shape[-1]
    box = {'boxes': torch.tensor([[0.0, 0.0, size / 2, size / 2]]), 'labels': torch.ones(1, dtype=torch.int64)}
    box |= {'masks': torch.ones(1, size, size), 'keypoints': torch.full((1, 17, 3), size / 4)}

    def mm_losses(network: Any, **batch: Any) -> list[Tensor]:
        return [network.parse_losses(network(**batch, mode='loss'))[0]]

    def of_labels(network: nn.Module) -> list[Tensor]:
        return mm_losses(network, **random_batch(network, 2, size, size))

    def of_views(network: nn.Module) -> list[Tensor]:
        return mm_losses(network, inputs=[images, images], data_samples=[DataSample(), DataSample()])

    def of_images(network: nn.Module) -> list[Tensor]:
        return mm_losses(network, inputs=images, data_samples=[DataSample(), DataSample()])

    def of_boxes(network: nn.Module) -> list[Tensor]:
        return _floats(network(list(images), [box] * 2))

    def of_masks(network: nn.Module) -> list[Tensor]:
        return _floats(network(images, labels=torch.ones(2, size, size, dtype=torch.int64)).loss)

    def of_classes(network: nn.Module) -> list[Tensor]:
        return _floats(network(images, labels=torch.ones(2, dtype=torch.int64)).loss)

    def of_queries(network: nn.Module) -> list[Tensor]:
        masks, classes = [torch.ones(1, size, size)] * 2, [torch.ones(1, dtype=torch.int64)] * 2
        return _floats(network(images, mask_labels=masks, class_labels=classes).loss)

    ways: tuple[Run, ...] = (of_boxes,)
    if hasattr(model, 'data_preprocessor'):
        ways = (of_labels, of_views, of_images)
    elif _library(model) == 'transformers':
        ways = (of_masks, of_classes, of_queries)
    for losses in ways:
        try:
            _backward(model, losses)
            return losses
        except Exception:  # it does not accept such a batch
            continue
    _backward(model, run)
    return run


def _floats(outputs: Any) -> list[Tensor]:
    """Return all floating-point tensors of a network's outputs."""
    if isinstance(outputs, Tensor):
        return [outputs] if outputs.is_floating_point() else []
    if isinstance(outputs, Mapping):
        outputs = list(outputs.values())
    return [each for part in outputs for each in _floats(part)] if isinstance(outputs, (list, tuple)) else []


def _backward(model: nn.Module, run: Run) -> None:
    model.zero_grad()
    torch.stack([each.float().square().mean() for each in run(model.train())]).sum().backward()


def _gradient_problem(model: nn.Module, run: Run, used: set[str]) -> str | None:
    """Train a step; return a message if a used code or generator has no finite gradient."""
    _backward(model, run)
    convs = {name: conv for name, conv in generated_convs(model) if f'{name}.weight' in used}
    used_generators = {id(conv.generator) for conv in convs.values()}
    learning: dict[str, Tensor] = {f'{name}.code': conv.code for name, conv in convs.items()}
    for position, generator in enumerate(bank_of(model)):
        if id(generator) in used_generators:
            learning[f'generator {position}'] = generator.weight
    for name, parameter in learning.items():
        if parameter.grad is None or not parameter.grad.isfinite().all():
            return f'{name} gets no finite gradient'
    return None


@torch.no_grad()
def _storage_problem(model: nn.Module, run: Run, keys: list[str], source: Source | None) -> str | None:
    """Store, materialise and load a network; return a message if names or outputs differ.

    With a source, the file alone gives the network that is loaded.
    """
    expected = run(model.eval())
    with TemporaryDirectory() as folder:
        path = Path(folder, 'small.safetensors')
        save_compact(model, path, source=source)
        model = materialise(model)
        if list(model.state_dict()) != keys:
            return 'materialised, its state dict has other names'
        problem = _difference('materialised', expected, run(model.eval()))
        if problem is not None:
            return problem
        for value in model.state_dict().values():
            value.fill_(1)  # shows tensors that the file does not restore
        model = load_compact(path, None if source else model)
    return _difference('loaded', expected, run(model.eval()))


def _difference(what: str, expected: list[Tensor], outputs: list[Tensor]) -> str | None:
    """Return a message if outputs differ by more than rounding."""
    for one, other in zip(expected, outputs, strict=True):
        if one.shape != other.shape:
            return f'the {what} network gives {tuple(other.shape)}, not {tuple(one.shape)}'
        size = float(one.abs().nan_to_num().max()) if one.numel() else 0.0
        if not torch.allclose(one, other, rtol=1e-4, atol=1e-5 * size, equal_nan=True):
            return f'the {what} network differs by {float((one - other).abs().max())}'
    return None
