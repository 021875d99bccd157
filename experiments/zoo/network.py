"""One network of a library: a generator for each of its kernels, everything tried."""

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from copy import deepcopy
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from mmengine.config import Config
from mmengine.logging import MessageHub
from mmengine.registry import MODELS, init_default_scope
from mmpretrain.structures import DataSample
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from csg_seg.errors import CSGError
from csg_seg.generators.settings import Settings
from csg_seg.layers.conv import find_convs, generated_convs
from csg_seg.mm.model import retrofit_for_runner
from csg_seg.mm.running.processes import replace_sync_bn
from csg_seg.report import summarise
from csg_seg.retrofitting.selection import Cause, generable, not_generable, reason_to_skip
from csg_seg.retrofitting.surgery import materialise
from csg_seg.storage.compact import load_compact, save_compact
from experiments.batches import random_batch

# Smallest first, but for those of LeNet; some networks take one size alone.
SIZES = (64, 128, 160, 224, 256, 336, 384, 448, 512, 640, 32)
FRAMES = 16
RATIO = 9


def check_network(scope: str, spec: Any) -> dict[str, Any]:
    """Retrofit a network with a generator for each kernel, and see that everything works.

    Args:
        scope: its library.
        spec: a value of :func:`csg_seg.mm.zoo.list_networks`.

    Returns:
        JSON-ready: ``result``, 'pass', 'no conv', 'refused', 'not run dense' or 'fail'; ``reason`` of all but a
        pass. Of a pass and of 'no conv', ``left_dense``, the count of convs for each reason; of a pass what it
        ``trains_on``, 'losses' or 'outputs', the count of convs ``generated``, and its compression ``ratio``.
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
    except Exception as error:  # whatever a foreign network makes of this machine and input
        return {'result': 'not run dense', 'reason': one_line(error)}
    keys = list(model.state_dict())
    try:
        retrofit_for_runner(model, csg)
    except CSGError as error:
        return {'result': 'refused', 'reason': str(error)}
    summary = summarise(model)
    # settings_for leaves out a kernel size whose convs all cost more generated.
    causes = [each.cause for each in model.csg.left_dense.values()]
    causes = [Cause.COSTS_MORE if cause is Cause.OTHER_KERNEL else cause for cause in causes]
    try:
        problem = _gradient_problem(model, run_loss, used) or _storage_problem(model, run, keys)
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
    """Return a dict of settings for each kernel size, and each width of narrow groups, of convs that cost less so.

    Args:
        model: dense.
    """
    waiting = generable(model)
    sizes: Counter[tuple[int, ...]] = Counter()
    for conv in waiting.values():
        sizes[conv.kernel_size] += conv.weight.numel()
    shapes = {_slice_shape(conv, sizes[conv.kernel_size]) for conv in waiting.values()}
    csg = []
    # Wide slices first: they leave narrow groups to the next.
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
    """Stands for a network whose config cannot be read here."""


def one_line(error: BaseException) -> str:
    """Return the kind of an error and the beginning of what it says, without this machine's paths."""
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
            model.transform.min_size = SIZES[:1]  # or it would enlarge the images
        return model
    if scope == 'timm':
        return import_module('timm').create_model(spec, pretrained=False)
    init_default_scope(scope)
    MessageHub.get_current_instance().update_info('max_iters', 1)  # momentum encoders ask for it
    model = Config({'model': deepcopy(spec)}).model  # of which parts may be asked for as attributes
    replace_sync_bn(model)
    return MODELS.build(model)


def _sketch(scope: str, spec: Any) -> nn.Module | None:
    """Return a network whose weights take neither time nor memory, None where it has to be built in full."""
    try:
        with torch.device('meta'):
            return _build(scope, spec)
    except Exception:  # what computes with its values while it is built
        return None


Run = Callable[[nn.Module], list[Tensor]]
Call = Callable[[nn.Module, Tensor], Any]


def _runs(model: nn.Module) -> tuple[Run, Run]:
    """Return how to run a network, and how to train it, on the smallest input that it takes.

    It holds the gradients of a step afterwards.
    """
    first: Exception | None = None
    in_training: Exception | None = None
    for size in SIZES:
        images = _images(model, size)
        for call in _calls(model):

            def run(network: nn.Module, images: Tensor = images, call: Call = call) -> list[Tensor]:
                torch.manual_seed(0)  # some heads start an iteration at random
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
    raise in_training or first or ValueError('it takes no input')


def _calls(model: nn.Module) -> Iterator[Call]:
    """Yield how networks take images: as they are, as a list, as a pair, as a video."""
    if hasattr(model, 'data_preprocessor'):
        yield lambda network, images: network(images, mode='tensor')
        return
    yield lambda network, images: network(images)
    if not type(model).__module__.startswith('torchvision'):
        return
    yield lambda network, images: network(list(images))
    yield lambda network, images: network(images, images)
    yield lambda network, images: network(images[:, :, None].expand(-1, -1, FRAMES, -1, -1))


def _images(model: nn.Module, size: int) -> Tensor:
    """Return two images, in colour but where the first conv takes them grey."""
    first = next(iter(find_convs(model).values()), None)
    channels = 1 if first is not None and first.in_channels == 1 else 3
    return torch.randn(2, channels, size, size, generator=torch.Generator().manual_seed(0))


def _loss_run(model: nn.Module, run: Run, images: Tensor) -> Run:
    """Train a step; return how, with losses where the network is known to give some, with outputs elsewhere."""
    size = images.shape[-1]
    box = {'boxes': torch.tensor([[0.0, 0.0, size / 2, size / 2]]), 'labels': torch.ones(1, dtype=torch.int64)}
    box |= {'masks': torch.ones(1, size, size), 'keypoints': torch.full((1, 17, 3), size / 4)}

    def mm_losses(network: nn.Module, **batch: Any) -> list[Tensor]:
        return [network.parse_losses(network(**batch, mode='loss'))[0]]

    def of_labels(network: nn.Module) -> list[Tensor]:
        return mm_losses(network, **random_batch(network, 2, size, size))

    def of_views(network: nn.Module) -> list[Tensor]:
        return mm_losses(network, inputs=[images, images], data_samples=[DataSample(), DataSample()])

    def of_images(network: nn.Module) -> list[Tensor]:
        return mm_losses(network, inputs=images, data_samples=[DataSample(), DataSample()])

    def of_boxes(network: nn.Module) -> list[Tensor]:
        return _floats(network(list(images), [box] * 2))

    for losses in (of_labels, of_views, of_images) if hasattr(model, 'data_preprocessor') else (of_boxes,):
        try:
            _backward(model, losses)
            return losses
        except Exception:  # it takes no such batch
            continue
    _backward(model, run)
    return run


def _floats(outputs: Any) -> list[Tensor]:
    """Return all floating tensors in what a network gives."""
    if isinstance(outputs, Tensor):
        return [outputs] if outputs.is_floating_point() else []
    if isinstance(outputs, Mapping):
        outputs = list(outputs.values())
    return [each for part in outputs for each in _floats(part)] if isinstance(outputs, (list, tuple)) else []


def _backward(model: nn.Module, run: Run) -> None:
    model.zero_grad()
    torch.stack([each.float().square().mean() for each in run(model.train())]).sum().backward()


def _gradient_problem(model: nn.Module, run: Run, used: set[str]) -> str | None:
    """Train a step; say which code or generator that a loss depends on gets no finite gradient."""
    _backward(model, run)
    convs = {name: conv for name, conv in generated_convs(model) if f'{name}.weight' in used}
    fed = {id(conv.generator) for conv in convs.values()}
    learning = {f'{name}.code': conv.code for name, conv in convs.items()}
    for position, generator in enumerate(model.csg):
        if id(generator) in fed:
            learning[f'generator {position}'] = generator.weight
    for name, parameter in learning.items():
        if parameter.grad is None or not parameter.grad.isfinite().all():
            return f'{name} gets no finite gradient'
    return None


@torch.no_grad()
def _storage_problem(model: nn.Module, run: Run, keys: list[str]) -> str | None:
    """Store, materialise and load a network; say what of its names and outputs is not as it was."""
    expected = run(model.eval())
    with TemporaryDirectory() as folder:
        path = Path(folder, 'small.safetensors')
        save_compact(model, path)
        model = materialise(model)
        if list(model.state_dict()) != keys:
            return 'materialised, its state dict has other names'
        problem = _difference('materialised', expected, run(model.eval()))
        if problem is not None:
            return problem
        for value in model.state_dict().values():
            value.fill_(1)  # what the file leaves as it was would show
        load_compact(path, model)
    return _difference('loaded', expected, run(model.eval()))


def _difference(what: str, expected: list[Tensor], outputs: list[Tensor]) -> str | None:
    """Say how the outputs of a network that was stored differ, beyond rounding, from those of before."""
    for one, other in zip(expected, outputs, strict=True):
        if one.shape != other.shape:
            return f'the {what} network gives {tuple(other.shape)}, not {tuple(one.shape)}'
        size = float(one.abs().nan_to_num().max()) if one.numel() else 0.0
        if not torch.allclose(one, other, rtol=1e-4, atol=1e-5 * size, equal_nan=True):
            return f'the {what} network differs by {float((one - other).abs().max())}'
    return None
