"""Train several configs with several seeds by the project's own tools, and gather what they score."""

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from rich.console import Console
from rich.progress import track

from ..checkpoint import write_whole
from ..errors import CSGError
from ..report import summarise
from .compare import made_with
from .model import build_model


def benchmark(
    configs: Mapping[str, Config],
    paths: Mapping[str, str],
    seeds: Sequence[int],
    work_dir: str | Path,
    *,
    tools: Path,
    metric: str = 'accuracy/top1',
    jobs: int = 1,
    cfg_options: Sequence[str] = (),
) -> dict[str, Any]:
    """Train and test every config with every seed, each in a process of its own.

    A run that is done already is not repeated, one that was interrupted goes on.

    Args:
        configs: by name.
        paths: file of each config.
        seeds: of data order, augmentation and start values.
        work_dir: a folder for each run goes into it.
        tools: folder of train.py and test.py.
        metric: name of the score, as the test tool prints it.
        jobs: how many runs at a time; they share the CPU's cores.
        cfg_options: ``key=value`` for all.

    Returns:
        JSON-ready: for each config its counts, the score of each seed, their mean
        and standard deviation; and ``made_with``.

    Raises:
        CSGError: a run failed, or has no such metric.
    """
    # Each config's first seed before any second: a picture emerges early.
    runs = [(name, seed) for seed in seeds for name in configs]
    folders = {(name, seed): Path(work_dir, name, f'seed{seed}') for name, seed in runs}
    threads = max(1, torch.get_num_threads() // jobs)
    with ThreadPoolExecutor(jobs) as pool:
        waiting = [
            pool.submit(_run, tools, paths[name], configs[name], seed, folders[name, seed], cfg_options, threads)
            for name, seed in runs
        ]
        try:
            for each in track(as_completed(waiting), 'Training', total=len(waiting), console=Console(stderr=True)):
                each.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    networks = {}
    for name, cfg in configs.items():
        scores = {seed: _score(folders[name, seed], metric) for seed in seeds}
        summary = summarise(build_model(cfg))
        networks[name] = {
            'stored_params': summary.stored_params,
            'dense_params': summary.dense_params,
            'compression_ratio': summary.compression_ratio,
            'scores': scores,
            'mean': statistics.mean(scores.values()),
            'std': statistics.stdev(scores.values()) if len(scores) > 1 else None,
        }
    versions = made_with(seed=seeds[0])
    del versions['seed']
    return {'metric': metric, 'networks': networks, 'made_with': {**versions, 'threads_of_a_run': threads}}


def _run(
    tools: Path, path: str, cfg: Config, seed: int, folder: Path, cfg_options: Sequence[str], threads: int
) -> None:
    """Train and test one config with one seed, unless that is done."""
    result = folder / 'result.json'
    if result.exists():
        return
    options = ['--cfg-options', *cfg_options, f'randomness.seed={seed}']
    if 'csg' in cfg.model:
        options.append(f'model.csg.seed={seed}')
    common = ['--work-dir', folder, *options]
    _call(tools / 'train.py', path, '--resume', *common, log=folder / 'train.txt', threads=threads)
    checkpoint = (folder / 'last_checkpoint').read_text()
    printed = _call(tools / 'test.py', path, checkpoint, '--json', *common, log=folder / 'test.txt', threads=threads)
    write_whole(result, lambda partial: Path(partial).write_text(printed))


def _call(tool: Path, *args: str | Path, log: Path, threads: int) -> str:
    """Run a program; return what it prints to stdout."""
    log.parent.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, 'OMP_NUM_THREADS': str(threads)}
    with log.open('w') as file:
        command = [sys.executable, str(tool), *map(str, args)]
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=file, text=True, env=environment)
    if done.returncode != 0:
        last = log.read_text().strip().splitlines()[-1:]
        raise CSGError(f'{tool.name} {args[0]} failed: {" ".join(last)[:200]} (all of it: {log})')
    return done.stdout


def _score(folder: Path, metric: str) -> float:
    scores = json.loads((folder / 'result.json').read_text())
    if metric not in scores:
        raise CSGError(f'{folder}: there is no metric {metric!r}; the test gave {", ".join(scores)}')
    return scores[metric]
