"""Every network that an installed library offers: retrofitted, trained for a step, stored, loaded, materialised."""

import json
import math
import multiprocessing
import os
import re
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import redirect_stderr, redirect_stdout
from copy import deepcopy
from fnmatch import fnmatchcase
from importlib import import_module
from importlib.util import find_spec
from itertools import islice
from multiprocessing.connection import wait
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from ..checkpoint import load_compact, save_compact
from ..conv import generated_convs
from ..errors import CSGError
from ..report import summarise
from ..retrofit import generable, materialise, reason_to_pass, retrofit
from ..settings import Settings
from .batches import random_batch
from .builder import without_weights
from .launch import replace_sync_bn

SCOPES = ('mmseg', 'mmpretrain', 'torchvision', 'timm')
# Smallest first; some networks take one size alone.
SIZES = (64, 128, 224, 256, 384, 512)
# Settings of a network that two of its configs may have different.
OTHERWISE = 'data_preprocessor|train_cfg|test_cfg|num_classes|loss.*'
FRAMES = 16
RATIO = 9
PRELOAD = ('csg_seg', 'mmseg.models', 'mmpretrain.models', 'torchvision', 'timm')


def list_networks(scope: str, patterns: Sequence[str] = ('*',)) -> dict[str, Any]:
    """Return what builds each distinct network of a library, by the name of its model or first config.

    Args:
        scope: one of :data:`SCOPES`.
        patterns: of the names, one of which matches.

    Raises:
        CSGError: there is no such scope, its library is not installed, or nothing is named so.
    """
    if scope not in SCOPES:
        raise CSGError(f'there is no scope {scope!r}; take one of {", ".join(SCOPES)}')
    if find_spec(scope) is None:
        raise CSGError(f'{scope} is not installed')
    paths: dict[str, Path] = {}
    if scope in ('torchvision', 'timm'):
        models = import_module('torchvision.models' if scope == 'torchvision' else scope)
        names = list(models.list_models())
    else:
        folder = Path(import_module(scope).__file__ or '').parent / '.mim' / 'configs'
        paths = {path.stem: path for path in sorted(folder.glob('*/*.py')) if path.parent.name != '_base_'}
        names = list(paths)
    chosen = [name for name in names if any(fnmatchcase(name, pattern) for pattern in patterns)]
    if not chosen:
        raise CSGError(f'no network of {scope} is named {" or ".join(patterns)}; names look like {names[0]}')
    return _read_networks([paths[name] for name in chosen]) if paths else {name: name for name in chosen}


def _read_networks(paths: Iterable[Path]) -> dict[str, Any]:
    networks: dict[str, Any] = {}
    for path in paths:
        try:
            model = without_weights(Config.fromfile(str(path)).get('model'))
        except Exception:  # a config for packages that are not there
            continue
        key = json.dumps(_network(model), sort_keys=True, default=str)
        if model:
            networks.setdefault(key, (path.stem, model))
    return dict(networks.values())


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


def check_all(
    scope: str,
    networks: Mapping[str, Any],
    *,
    jobs: int = 1,
    seconds: float = 300.0,
    track: Callable[[Sequence[int]], Iterable[int]] = iter,
) -> Iterator[dict[str, Any]]:
    """Yield what :func:`check_network` finds of each network, in a process each, as they end.

    Args:
        scope: of the networks.
        networks: of :func:`list_networks`.
        jobs: networks at a time.
        seconds: after which one is given up.
        track: wraps the counts, to show progress.

    Raises:
        CSGError: no network could be checked at a time, or no time is given.
    """
    if jobs < 1 or seconds <= 0:
        raise CSGError(f'cannot check with jobs={jobs}, seconds={seconds:g}: at least one job, and more than 0 seconds')
    context = multiprocessing.get_context('forkserver')
    context.set_forkserver_preload([name for name in PRELOAD if find_spec(name.split('.')[0])])
    waiting = iter(networks.items())
    running: list[_Check] = []
    try:
        for _ in track(range(len(networks))):
            starting = islice(waiting, jobs - len(running))
            running += [_Check(context, scope, name, spec, seconds) for name, spec in starting]
            done = _first_done(running)
            running.remove(done)
            yield done.row()
    finally:
        for check in running:
            check.stop()


class _Check:
    """The check of one network in a process of its own, which may crash or hang."""

    def __init__(self, context: Any, scope: str, name: str, spec: Any, seconds: float):
        self.scope, self.name, self.seconds = scope, name, seconds
        self.start = time.perf_counter()
        self.receive, send = context.Pipe(duplex=False)
        self.process = context.Process(target=_send, args=(scope, spec, send))
        self.process.start()
        send.close()

    def seconds_left(self) -> float:
        """Return the seconds until the check is given up."""
        return max(0.0, self.start + self.seconds - time.perf_counter())

    def row(self) -> dict[str, Any]:
        """Return what was found, and end the process."""
        row = {'result': 'fail', 'reason': f'not done after {self.seconds:g} s'}
        try:
            if self.receive.poll():
                row = self.receive.recv()
        except EOFError:
            self.process.join()
            row = {'result': 'fail', 'reason': f'its process ended with status {self.process.exitcode}'}
        self.stop()
        return {'scope': self.scope, 'name': self.name, **row, 'seconds': round(time.perf_counter() - self.start, 1)}

    def stop(self) -> None:
        """End the process, if it runs still."""
        self.process.kill()
        self.process.join()


def _first_done(running: Sequence[_Check]) -> _Check:
    """Wait for a check that has sent its row, has died or is given up."""
    while True:
        wait([check.receive for check in running], timeout=min(check.seconds_left() for check in running))
        for check in running:
            if check.receive.poll() or not check.seconds_left():
                return check


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Return the rows that a run has written so far, none if there is no such file.

    Raises:
        CSGError: a line holds none.
    """
    rows = []
    for number, line in enumerate(path.read_text().splitlines() if path.exists() else (), 1):
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if not isinstance(row, dict) or not {'name', 'result', 'reason', 'seconds'} <= row.keys():
            raise CSGError(f'{path}: line {number} is no row of such a check; delete the line, or take another file')
        rows.append(row)
    return rows


def check_network(scope: str, spec: Any) -> dict[str, Any]:
    """Retrofit a network with a generator for each kernel, and see that everything works.

    Args:
        scope: its library.
        spec: a value of :func:`list_networks`.

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


def _network(value: Any) -> Any:
    """Return of a config what makes the network another one: no data, no losses, no number of classes."""
    if isinstance(value, Mapping):
        return {key: _network(each) for key, each in value.items() if not re.fullmatch(OTHERWISE, key)}
    if isinstance(value, (list, tuple)):
        return [_network(each) for each in value]
    return 'BN' if value == 'SyncBN' else value


def _line(error: BaseException) -> str:
    return f'{type(error).__name__}: {" ".join(str(error).split())[:200]}'


def _send(scope: str, spec: Any, connection: Any) -> None:
    torch.set_num_threads(1)
    with Path(os.devnull).open('w') as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
        row = check_network(scope, spec)
    connection.send(row)


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
