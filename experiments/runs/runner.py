"""Train several configs with several seeds by the project's own tools, and gather what they score."""

import hashlib
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from rich.console import Console
from rich.progress import track

from csg_seg.cli.results import made_with
from csg_seg.errors import CSGError
from csg_seg.files import check_folder, write_whole
from csg_seg.mm.checkpoints.descriptions import leaves
from csg_seg.mm.model import build_model
from csg_seg.mm.running.preflight import check_optimizer
from csg_seg.mm.running.work_dir import latest_checkpoint
from csg_seg.report import summarise


def benchmark(
    configs: Mapping[str, Config],
    seeds: Sequence[int],
    work_dir: str | Path,
    *,
    tools: Path,
    metric: str = 'accuracy/top1',
    jobs: int = 1,
) -> dict[str, Any]:
    """Train and test every config with every seed, each in a process of its own.

    A run that is done already is not repeated, one that was interrupted goes on.

    Args:
        configs: by name.
        seeds: of data order, augmentation and start values.
        work_dir: a folder for each run goes into it.
        tools: folder of train.py and test.py.
        metric: name of the score, as the test tool prints it.
        jobs: how many runs at a time; they share the CPU's cores.

    Returns:
        JSON-ready: for each config its counts, the score of each seed, their mean
        and standard deviation; and ``made_with``.

    Raises:
        CSGError: a run failed, has no such metric, or its folder holds one of other settings.
    """
    check_counts(seeds, jobs)
    check_folder(work_dir, given=f'--work-dir {work_dir}')
    summaries = {}
    for name, cfg in configs.items():
        model = build_model(cfg)
        check_optimizer(cfg, model)
        summaries[name] = summarise(model)
    # Each config's first seed before any second: a picture emerges early.
    runs = {(name, seed): Path(work_dir, name, f'seed{seed}') for seed in seeds for name in configs}
    for (name, seed), folder in runs.items():
        _prepare(configs[name], seed, folder)
    threads = max(1, torch.get_num_threads() // jobs)
    _run_all(list(runs.values()), tools, metric, jobs=jobs, threads=threads)
    networks = {}
    for name, summary in summaries.items():
        scores = {seed: _score(runs[name, seed], metric) for seed in seeds}
        networks[name] = {
            'stored_params': summary.stored_params,
            'dense_params': summary.dense_params,
            'compression_ratio': summary.compression_ratio,
            'scores': scores,
            'mean': statistics.mean(scores.values()),
            'std': statistics.stdev(scores.values()) if len(scores) > 1 else None,
        }
    versions = {key: value for key, value in made_with(seed=0).items() if key != 'seed'}
    return {'metric': metric, 'networks': networks, 'made_with': {**versions, 'threads_of_a_run': threads}}


def check_counts(seeds: Sequence[int], jobs: int) -> None:
    """Refuse seeds and numbers of jobs that no run can have.

    Raises:
        CSGError: says which.
    """
    if jobs < 1 or min(seeds) < 0:
        raise CSGError(f'cannot work with jobs={jobs}, seeds={list(seeds)}: jobs start at 1 and seeds at 0')


def evaluate(
    cfg: Config, checkpoint: str, folder: str | Path, *, tools: Path, metric: str = 'accuracy/top1', jobs: int = 1
) -> dict[str, Any]:
    """Test a checkpoint under a config, in a process of its own, unless that is done.

    Returns:
        the score, and the metric's name.
    """
    folder, cfg = Path(folder), deepcopy(cfg)
    cfg.load_from = str(checkpoint)
    _prepare(cfg, 0, folder)
    if not (folder / 'result.json').exists():
        threads = max(1, torch.get_num_threads() // jobs)
        printed = _call(
            tools / 'test.py', _config(folder), checkpoint, '--json', log=folder / 'test.txt', threads=threads
        )
        write_whole(folder / 'result.json', lambda partial: partial.write_text(printed))
    return {'metric': metric, 'score': _score(folder, metric)}


def _prepare(cfg: Config, seed: int, folder: Path) -> None:
    """Write a run's whole config beside its folder, or find it there."""
    cfg = deepcopy(cfg)
    cfg.merge_from_dict({'randomness.seed': seed, 'work_dir': str(folder)})
    if cfg.model.type == 'CSGModel':
        dicts = cfg.model.csg if isinstance(cfg.model.csg, list) else [cfg.model.csg]
        for position, csg in enumerate(dicts):
            csg.seed = seed * len(dicts) + position
    # So that scores of other weights, which stood under the same names, are not taken for these.
    named = {each for key, each in leaves(cfg.to_dict()) if key in ('checkpoint', 'load_from') and each}
    files = sorted(each for each in named if Path(each).is_file())
    cfg.digests = {path: hashlib.sha256(Path(path).read_bytes()).hexdigest() for path in files}
    file, text = _config(folder), cfg.pretty_text
    if file.exists() and file.read_text() != text:
        raise CSGError(f'{folder} holds a run of other settings ({file}); choose another --work-dir')
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(file, lambda partial: partial.write_text(text))


def _config(folder: Path) -> Path:
    # Not in the folder, where the runner writes what it was called with under the same name.
    return folder.with_suffix('.py')


def _run_all(folders: Sequence[Path], tools: Path, metric: str, *, jobs: int, threads: int) -> None:
    with ThreadPoolExecutor(jobs) as pool:
        waiting = {pool.submit(_run, folder, tools, threads): folder for folder in folders}
        try:
            for each in track(as_completed(waiting), 'Training', total=len(waiting), console=Console(stderr=True)):
                each.result()
                _score(waiting[each], metric)  # a wrong name shows after the first run
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _run(folder: Path, tools: Path, threads: int) -> None:
    """Train and test the config of a folder, unless that is done."""
    result, config = folder / 'result.json', _config(folder)
    if result.exists():
        return
    _call(tools / 'train.py', config, '--resume', log=folder / 'train.txt', threads=threads)
    checkpoint = latest_checkpoint(folder)
    printed = _call(tools / 'test.py', config, checkpoint, '--json', log=folder / 'test.txt', threads=threads)
    write_whole(result, lambda partial: partial.write_text(printed))


def _call(tool: Path, *args: str | Path, log: Path, threads: int) -> str:
    """Run a program; return what it prints to stdout."""
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
