"""Time and memory of retrofitting, fitting, saving and loading, from small networks to large ones."""

import multiprocessing
import resource
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from mmengine.config import Config
from torch import nn

from csg_seg.errors import CSGError
from csg_seg.layers.bank import find_bank
from csg_seg.mm.model import build_model
from csg_seg.report import summarise
from csg_seg.retrofitting.surgery import retrofit
from csg_seg.retrofitting.weights import fit
from csg_seg.running.processes import replace_sync_bn
from csg_seg.storage.compact import load_compact, save_compact
from experiments.zoo.network import settings_for

PHASES = ('build', 'retrofit', 'fit', 'save', 'load')


def measure_scale(
    cfgs: Mapping[str, Config], *, track: Callable[..., Iterable[tuple[str, Config]]]
) -> dict[str, dict[str, Any]]:
    """Measure all phases of each network on the CPU, with a generator for each kernel size, in its own process.

    Args:
        cfgs: dense mmseg or mmpretrain configs, by name.
        track: wraps the networks, to show progress.

    Returns:
        JSON-ready, by name: ``params`` of the dense network and ``stored_params``; ``seconds`` of each of
        :data:`PHASES`; ``dense_bytes`` and ``compact_bytes``; ``peak_bytes`` of memory during retrofit, fit
        and save, beyond the dense network and the weights to fit.

    Raises:
        CSGError: a config is not dense, generating would not shrink any conv, or a process was killed.
    """
    for name, cfg in cfgs.items():
        if 'csg' in cfg.model:
            raise CSGError(f'{name}: give the dense config; it is retrofitted here')
    context = multiprocessing.get_context('spawn')
    results = {}
    for name, cfg in track(list(cfgs.items())):
        with ProcessPoolExecutor(1, mp_context=context) as pool:
            try:
                results[name] = pool.submit(_measure, name, cfg).result()
            except BrokenProcessPool:
                raise CSGError(f'{name}: its process was killed, perhaps because memory ran out') from None
    return results


def _measure(name: str, cfg: Config) -> dict[str, Any]:
    replace_sync_bn(cfg.model)
    seconds: dict[str, float] = {}

    @contextmanager
    def timed(phase: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        seconds[phase] = time.perf_counter() - start

    with timed('build'):
        model = _build(cfg)
    if find_bank(model) is not None:
        raise CSGError(f'{name}: give the dense config; it is retrofitted here')
    csg = settings_for(model)
    if not csg:
        raise CSGError(f'{name}: generating would not shrink any conv')
    weights = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    before = _peak_bytes()
    with timed('retrofit'):
        retrofit(model, csg)
    with timed('fit'):
        fit(model, weights)
    with TemporaryDirectory() as folder:
        path = Path(folder, 'small.safetensors')
        with timed('save'):
            save_compact(model, path)
        peak, size = _peak_bytes() - before, path.stat().st_size
        dense = _build(cfg)
        with timed('load'):
            load_compact(path, dense)
    summary = summarise(model)
    return {
        'params': summary.dense_params,
        'stored_params': summary.stored_params,
        'seconds': seconds,
        'dense_bytes': summary.dense_bytes,
        'compact_bytes': size,
        'peak_bytes': peak,
    }


def _build(cfg: Config) -> nn.Module:
    torch.manual_seed(0)
    return build_model(cfg)


def _peak_bytes() -> int:
    """Return the peak memory of this process."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
