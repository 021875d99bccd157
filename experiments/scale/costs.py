"""What retrofitting, fitting, saving and loading cost in time and memory, from small networks to the largest."""

import multiprocessing
import os
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
from matplotlib.figure import Figure
from mmengine.config import Config
from torch import nn

from csg_seg.errors import CSGError
from csg_seg.layers.bank import find_bank
from csg_seg.mm.figures import save_figure
from csg_seg.mm.model import build_model
from csg_seg.mm.running.processes import replace_sync_bn
from csg_seg.report import summarise
from csg_seg.retrofitting.surgery import retrofit
from csg_seg.retrofitting.weights import fit
from csg_seg.storage.compact import load_compact, save_compact
from experiments.zoo.network import settings_for

PHASES = ('build', 'retrofit', 'fit', 'save', 'load')


def measure_scale(
    cfgs: Mapping[str, Config], *, track: Callable[..., Iterable[tuple[str, Config]]]
) -> dict[str, dict[str, Any]]:
    """Take each network through all phases on the CPU, with a generator for each kernel size, in a process of its own.

    Args:
        cfgs: dense configs of mmseg or mmpretrain, by name.
        track: wraps the networks, to show progress.

    Returns:
        JSON-ready, by name: ``params`` of the dense network and ``stored_params``; ``seconds`` of each of
        :data:`PHASES`; ``dense_bytes`` and ``compact_bytes``; ``peak_bytes`` of memory while it is retrofitted,
        fitted and saved, beyond the dense network and the weights that are fitted.

    Raises:
        CSGError: a config is not dense, no conv of it would cost less generated, or a process was ended.
    """
    for name, cfg in cfgs.items():
        if 'csg' in cfg.model:
            raise CSGError(f'{name}: give the dense config; its convs are retrofitted here')
    context = multiprocessing.get_context('spawn')
    results = {}
    for name, cfg in track(list(cfgs.items())):
        with ProcessPoolExecutor(1, mp_context=context) as pool:
            try:
                results[name] = pool.submit(_measure, name, cfg).result()
            except BrokenProcessPool:
                raise CSGError(f'{name}: its process was ended, perhaps for want of memory') from None
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
        raise CSGError(f'{name}: give the dense config; its convs are retrofitted here')
    csg = settings_for(model)
    if not csg:
        raise CSGError(f'{name}: no conv would cost less generated')
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
    """Return the most memory that this process has held."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def draw_scale(results: Mapping[str, Mapping[str, Any]], path: str | os.PathLike) -> None:
    """Save a picture of seconds and memory against parameters.

    Args:
        results: of :func:`measure_scale`.
        path: of the picture; its ending names the format.
    """
    figure = Figure(figsize=(10, 4), layout='constrained')
    times, memory = figure.subplots(1, 2)
    rows = sorted(results.values(), key=lambda row: row['params'])
    millions = [row['params'] / 1e6 for row in rows]
    for phase, marker in zip(PHASES, 'os^Dv', strict=True):
        times.plot(millions, [row['seconds'][phase] for row in rows], marker, label=phase)
    for key, marker in (('peak_bytes', 'o'), ('dense_bytes', 's'), ('compact_bytes', '^')):
        memory.plot(millions, [row[key] / 1e6 for row in rows], marker, label=key.replace('_', ' '))
    for axis, label, start in ((times, 'seconds', 0.05), (memory, 'MB', 4)):
        if len(rows) > 1:
            axis.plot(millions, [start * each for each in millions], '--', color='gray', label='linear', zorder=0)
        axis.set_xscale('log')
        axis.set_yscale('log')
        axis.set_xlabel('million parameters of the dense network')
        axis.set_ylabel(label)
        axis.grid(which='both', alpha=0.3)
        axis.legend(fontsize=8)
    save_figure(figure, path)
