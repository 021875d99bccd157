"""Train and test several configs with several seeds, each in its own process, with the project's tools."""

import hashlib
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config

from csg_seg.cli.console import progress_bar
from csg_seg.cli.results import made_with
from csg_seg.errors import CSGError
from csg_seg.files import check_folder, write_whole
from csg_seg.mm.checkpoints.descriptions import leaves
from csg_seg.mm.model import build_model
from csg_seg.report import summarise
from csg_seg.running.preflight import check_optimizer
from csg_seg.running.work_dir import latest_checkpoint

ROOT = Path(__file__).parents[2]
CHECKPOINTS = ('.pth', '.safetensors')


def train_and_test(
    configs: Mapping[str, Config],
    seeds: Sequence[int],
    work_dir: str | Path,
    *,
    metric: str = 'accuracy/top1',
    jobs: int = 1,
) -> dict[str, Any]:
    """Train and test every config with every seed.

    Finished runs are not repeated; interrupted ones are resumed.

    Args:
        configs: by name.
        seeds: seeds of data order, augmentation and initial values.
        work_dir: folder that gets one folder for each run.
        metric: name of the score, as ``tools/test.py`` prints it.
        jobs: number of runs at a time; they share the CPU's cores.

    Returns:
        JSON-ready: parameter counts, the score of each seed, mean and standard deviation
        of each config; and ``made_with``.

    Raises:
        CSGError: a run failed, the metric does not exist, or a folder holds a run with other settings.
    """
    check_counts(seeds, jobs)
    check_folder(work_dir, given=f'--work-dir {work_dir}')
    summaries = {}
    for name, cfg in configs.items():
        model = build_model(cfg)
        check_optimizer(cfg, model)
        summaries[name] = summarise(model)
    # The first seed of all configs comes first, so that they can be compared early.
    runs = {(name, seed): Path(work_dir, name, f'seed{seed}') for seed in seeds for name in configs}
    for (name, seed), folder in runs.items():
        prepare(configs[name], seed, folder)
    threads = max(1, torch.get_num_threads() // jobs)
    _run_all(list(runs.values()), metric, jobs=jobs, threads=threads)
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
    """Check seeds and the number of jobs.

    Raises:
        CSGError: one of them is out of range.
    """
    if jobs < 1 or min(seeds) < 0:
        raise CSGError(f'cannot work with jobs={jobs}, seeds={list(seeds)}: jobs start at 1 and seeds at 0')


def evaluate(
    cfg: Config, checkpoint: str, folder: str | Path, *, metric: str = 'accuracy/top1', jobs: int = 1
) -> dict[str, Any]:
    """Test a checkpoint with a config, unless the folder already has the result.

    Args:
        cfg: config of the network.
        checkpoint: its weights.
        folder: folder that gets the result.
        metric: name of the score, as ``tools/test.py`` prints it.
        jobs: number of processes that share the CPU's cores.

    Returns:
        ``metric`` and ``score``.

    Raises:
        CSGError: the test failed, the metric does not exist, or the folder holds a run with other settings.
    """
    folder, cfg = Path(folder), deepcopy(cfg)
    cfg.load_from = str(checkpoint)
    prepare(cfg, 0, folder)
    if not (folder / 'result.json').exists():
        threads = max(1, torch.get_num_threads() // jobs)
        printed = call_tool(
            'test.py', config_file(folder), checkpoint, '--json', log=folder / 'test.txt', threads=threads
        )
        write_whole(folder / 'result.json', lambda partial: partial.write_text(printed))
    return {'metric': metric, 'score': _score(folder, metric)}


def prepare(cfg: Config, seed: int, folder: Path) -> None:
    """Write a run's complete config next to its folder, or check that the config there is the same.

    Raises:
        CSGError: the folder holds a run with other settings.
    """
    cfg = deepcopy(cfg)
    cfg.merge_from_dict({'randomness.seed': seed, 'work_dir': str(folder)})
    if cfg.model.type == 'CSGModel':
        dicts = cfg.model.csg if isinstance(cfg.model.csg, list) else [cfg.model.csg]
        for position, csg in enumerate(dicts):
            csg.seed = seed * len(dicts) + position
    # Results of other weights under the same file names must not be reused.
    texts = {each for _, each in leaves(cfg.to_dict()) if isinstance(each, str)}
    files = sorted(each for each in texts if each.endswith(CHECKPOINTS) and Path(each).is_file())
    cfg.digests = {path: hashlib.sha256(Path(path).read_bytes()).hexdigest() for path in files}
    file, text = config_file(folder), cfg.pretty_text
    # The values, because their format depends on the version of mmengine.
    if file.exists() and Config.fromfile(file, import_custom_modules=False).to_dict() != cfg.to_dict():
        raise CSGError(f'{folder} holds a run with other settings ({file}); choose another --work-dir')
    folder.mkdir(parents=True, exist_ok=True)
    if not file.exists():
        write_whole(file, lambda partial: partial.write_text(text))


def config_file(folder: Path) -> Path:
    """Return the file of a run's complete config."""
    # Not in the folder: mmengine dumps its config there under the same name.
    return folder.parent / f'{folder.name}.py'


def _run_all(folders: Sequence[Path], metric: str, *, jobs: int, threads: int) -> None:
    with ThreadPoolExecutor(jobs) as pool:
        waiting = {pool.submit(_run, folder, threads): folder for folder in folders}
        try:
            for each in progress_bar('Training')(as_completed(waiting), total=len(waiting)):
                each.result()
                _score(waiting[each], metric)  # finds a wrong metric after the first run
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _run(folder: Path, threads: int) -> None:
    """Train and test the config of a folder, unless the folder has the result."""
    result, config = folder / 'result.json', config_file(folder)
    if result.exists():
        return
    call_tool('train.py', config, '--resume', log=folder / 'train.txt', threads=threads)
    checkpoint = latest_checkpoint(folder)
    assert checkpoint is not None
    printed = call_tool('test.py', config, checkpoint, '--json', log=folder / 'test.txt', threads=threads)
    write_whole(result, lambda partial: partial.write_text(printed))


def call_tool(
    tool: str, *args: str | Path, log: Path, threads: int, started: Callable[[subprocess.Popen], object] = id
) -> str:
    """Run one of the tools in a process of its own.

    Args:
        tool: its file in ``tools``.
        *args: its arguments.
        log: file for what it prints on stderr.
        threads: number of CPU threads.
        started: called with the process.

    Returns:
        its standard output.

    Raises:
        CSGError: it failed.
    """
    # Configs may import experiments: custom_imports=['experiments.carry_over.proximal'].
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get('PYTHONPATH')]))
    environment = {**os.environ, 'OMP_NUM_THREADS': str(threads), 'PYTHONPATH': path}
    command = [sys.executable, str(ROOT / 'tools' / tool), *map(str, args)]
    with log.open('w') as file:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=file, text=True, env=environment)
        started(process)
        printed, _ = process.communicate()
    if process.returncode != 0:
        last = log.read_text().strip().splitlines()[-1:]
        raise CSGError(f'{tool} {args[0]} failed: {" ".join(last)[:200]} (all of it: {log})')
    return printed


def _score(folder: Path, metric: str) -> float:
    scores = json.loads((folder / 'result.json').read_text())
    if metric not in scores:
        raise CSGError(f'{folder}: there is no metric {metric!r}; the test gave {", ".join(scores)}')
    return scores[metric]
