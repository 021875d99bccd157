"""One network of a library: a generator for each of its kernels, everything tried."""

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import deepcopy
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from mmengine.registry import MODELS, init_default_scope
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from ..checkpoint import load_compact, save_compact
from ..conv import generated_convs
from ..report import summarise
from ..retrofit import generable, materialise, reason_to_pass, retrofit
from ..settings import Settings
from .batches import random_batch
from .launch import replace_sync_bn

# Smallest first; some networks take one size alone.
SIZES = (64, 128, 224, 256, 384, 512)
FRAMES = 16
RATIO = 9


def check_network(scope: str, spec: Any) -> dict[str, Any]:
    """Retrofit a network with a generator for each kernel, and see that everything works.

    Args:
        scope: its library.
        spec: a value of :func:`csg_seg.mm.zoo.list_networks`.

    Returns:
        JSON-ready: ``result``, 'pass', 'no conv', 'not run dense' or 'fail'; ``reason`` of all but a pass; counts.
    """
    nothing = {'result': 'no conv', 'reason': 'it has no conv that could be generated and would cost less so'}
    if _sketch(scope, spec) == []:
        return nothing
    torch.manual_seed(0)
    try:
        model = _build(scope, spec)
        run, run_loss = _runs(model)
        used = _used(model, run_loss)
    except Exception as error:  # whatever a foreign network makes of this machine and input
        return {'result': 'not run dense', 'reason': _line(error)}
    csg = settings_for(model)
    if not csg:
        return nothing
    keys = list(model.state_dict())
    try:
        retrofit(model, csg)
        left = Counter(reason.split(':')[0].split(',')[0] for reason in model.csg.left_dense.values())
        row = _check_retrofitted(model, run, run_loss, used, keys, lambda: _build(scope, spec))
        return {**row, 'left_dense': dict(left)}
    except Exception as error:
        return {'result': 'fail', 'reason': _line(error)}


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
        left = {name: conv for name, conv in waiting.items() if reason_to_pass(name, conv, settings, is_first=False)}
        if len(left) < len(waiting):
            csg.append(dict(slice_shape=slice_shape, code_dim=settings.code_dim))
        waiting = left
    return csg


def _slice_shape(conv: _ConvNd, numel: int) -> tuple[int, ...]:
    """Return the largest slices whose generator has at most a quarter of the weights of the conv's kernel size."""
    for side in (16, 8, 4):
        width = min(side, conv.weight.shape[1]) if conv.groups > 1 else side
        size = side * width * math.prod(conv.kernel_size)
        if size * (size // RATIO) <= numel / 4:
            break
    return side, width, *conv.kernel_size


def _line(error: BaseException) -> str:
    return f'{type(error).__name__}: {" ".join(str(error).split())[:200]}'


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
    model = deepcopy(spec)
    replace_sync_bn(model)
    return MODELS.build(model)


def _sketch(scope: str, spec: Any) -> list[dict[str, Any]] | None:
    """Return the settings for a network whose weights take neither time nor memory, None where it has to be built."""
    try:
        with torch.device('meta'):
            return settings_for(_build(scope, spec))
    except Exception:  # what computes with its values while it is built
        return None


Run = Callable[[nn.Module], list[Tensor]]


def _runs(model: nn.Module) -> tuple[Run, Run]:
    """Return how to run a network, and how to get losses from it, on the smallest input that it takes."""
    first: Exception | None = None
    for size in SIZES:
        for arguments, options in _inputs(model, size):

            def run(network: nn.Module, arguments: Any = arguments, options: Any = options) -> list[Tensor]:
                return _floats(network(*arguments, **options))

            try:
                with torch.no_grad():
                    run(model.eval())
                return run, _loss_run(model, run, size)
            except Exception as error:
                first = first or error
    raise first or ValueError('it takes no input')


def _inputs(model: nn.Module, size: int) -> Iterator[tuple[tuple[Any, ...], dict[str, Any]]]:
    """Yield what networks take: images, a list of them, a pair, a video."""
    images = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    if hasattr(model, 'data_preprocessor'):
        yield (images,), {'mode': 'tensor'}
        return
    yield (images,), {}
    if not type(model).__module__.startswith('torchvision'):
        return
    yield (list(images),), {}
    yield (images, images), {}
    yield (images[:, :, None].expand(-1, -1, FRAMES, -1, -1),), {}


def _loss_run(model: nn.Module, run: Run, size: int) -> Run:
    """Return how to get losses, with labels where the network is known to take them, and outputs elsewhere."""

    def run_loss(network: nn.Module) -> list[Tensor]:
        batch = random_batch(network, 2, size, size)
        return [network.parse_losses(network(**batch, mode='loss'))[0]]

    def run_boxes(network: nn.Module) -> list[Tensor]:
        images = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))
        boxes = torch.tensor([[0.0, 0.0, size / 2, size / 2]])
        target = {'boxes': boxes, 'labels': torch.ones(1, dtype=torch.int64), 'masks': torch.ones(1, size, size)}
        target['keypoints'] = torch.full((1, 17, 3), size / 4)
        return _floats(network(list(images), [target] * 2))

    for each in (run_loss, run_boxes):
        try:
            each(model.train())
            return each
        except Exception:  # it takes no such labels
            continue
    run(model)
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


def _used(model: nn.Module, run: Run) -> set[str]:
    """Return the parameters that the losses of a dense network depend on."""
    _backward(model, run)
    return {name for name, parameter in model.named_parameters() if parameter.grad is not None}


def _check_retrofitted(
    model: nn.Module, run: Run, run_loss: Run, used: set[str], keys: Sequence[str], build: Callable[[], nn.Module]
) -> dict[str, Any]:
    _backward(model, run_loss)
    convs = dict(generated_convs(model))
    for name, conv in convs.items():
        if f'{name}.weight' in used and (conv.code.grad is None or not conv.code.grad.isfinite().all()):
            return {'result': 'fail', 'reason': f'{name}.code gets no finite gradient'}
    fed = {id(conv.generator) for name, conv in convs.items() if f'{name}.weight' in used}
    for position, generator in enumerate(model.csg):
        gradient = generator.weight.grad
        if id(generator) in fed and (gradient is None or not gradient.isfinite().all()):
            return {'result': 'fail', 'reason': f'generator {position} gets no finite gradient'}
    with torch.no_grad(), TemporaryDirectory() as folder:
        expected = run(model.eval())
        save_compact(model, Path(folder, 'small.safetensors'))
        loaded = load_compact(Path(folder, 'small.safetensors'), build()).eval()
        after_loading = run(loaded)
        plain = run(materialise(model).eval())
    for what, outputs in (('loaded', after_loading), ('materialised', plain)):
        for one, other in zip(expected, outputs, strict=True):
            if one.shape != other.shape:
                return {
                    'result': 'fail',
                    'reason': f'the {what} network gives {tuple(other.shape)}, not {tuple(one.shape)}',
                }
            size = float(one.abs().nan_to_num().max()) if one.numel() else 0.0
            if not torch.allclose(one, other, rtol=1e-4, atol=1e-5 * size, equal_nan=True):
                return {'result': 'fail', 'reason': f'the {what} network differs by {float((one - other).abs().max())}'}
    if list(model.state_dict()) != list(keys):
        return {'result': 'fail', 'reason': 'materialised, its state dict has other names'}
    ratio = summarise(loaded).compression_ratio
    return {'result': 'pass', 'reason': '', 'generated': len(convs), 'ratio': round(ratio, 2)}
