"""Train several configs, each in a process of its own, with a progress bar for each."""

import multiprocessing
import sys
import warnings
from collections.abc import Iterator, Mapping, MutableMapping
from concurrent.futures import FIRST_EXCEPTION, ProcessPoolExecutor, wait
from contextlib import contextmanager, redirect_stdout
from typing import Any

import torch
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.runner import Runner
from rich.console import Console
from rich.progress import Progress

from csg_seg.files import writing_into
from csg_seg.mm.hooks.label_guard import LabelGuardHook

from .work_dir import guard_checkpoints


class CountHook(Hook):
    """Write the number of finished iterations into a dict that processes share."""

    def __init__(self, done: MutableMapping[str, int], name: str):
        self.done, self.name = done, name

    def after_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        """Write the number of finished iterations."""
        self.done[self.name] = runner.iter + 1


@contextmanager
def without_library_warnings() -> Iterator[None]:
    """Hide the Python warnings of mmengine and mmseg, which :class:`mmengine.runner.Runner` repeats for each run."""
    with warnings.catch_warnings():
        warnings.filterwarnings('ignore', module=r'mm(engine|seg)\.')
        yield


def train_all(cfgs: Mapping[str, Config]) -> None:
    """Train iteration-based configs, on a CPU at the same time and on a GPU one after the other."""
    workers = 1 if torch.cuda.is_available() else len(cfgs)
    threads = max(1, torch.get_num_threads() // workers)
    context = multiprocessing.get_context('spawn')
    bars = Progress(console=Console(stderr=True))
    with context.Manager() as manager, ProcessPoolExecutor(workers, mp_context=context) as pool, bars:
        done = manager.dict(dict.fromkeys(cfgs, 0))
        tasks = {name: bars.add_task(f'train {name}', total=cfg.train_cfg.max_iters) for name, cfg in cfgs.items()}
        runs = [pool.submit(_train, name, cfg, done, threads) for name, cfg in cfgs.items()]
        while wait(runs, timeout=1, return_when=FIRST_EXCEPTION).not_done:
            for name, task in tasks.items():
                bars.update(task, completed=done[name])
            if any(run.done() and run.exception() for run in runs):
                break
        for task, run in zip(tasks.values(), runs, strict=True):
            run.result()
            bars.update(task, completed=bars.tasks[task].total)


def _train(name: str, cfg: Config, done: MutableMapping[str, int], threads: int) -> None:
    torch.set_num_threads(threads)
    quiet = without_library_warnings()
    with quiet, redirect_stdout(sys.stderr), writing_into(cfg.work_dir), LabelGuardHook(cfg) as labels:
        runner = Runner.from_cfg(cfg)
        runner.register_hook(CountHook(done, name))
        runner.register_hook(labels)
        guard_checkpoints(runner)
        runner.train()
