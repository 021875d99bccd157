"""Train a CSG config and its dense twin, and set side by side what they store, score and take."""

import multiprocessing
import statistics
import time
from collections.abc import Mapping, MutableMapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ProcessPoolExecutor, wait
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from mmengine.config import Config
from mmengine.dataset import pseudo_collate
from mmengine.hooks import Hook
from mmengine.runner import Runner
from rich.console import Console
from rich.progress import Progress

from csg_seg.cli.results import made_with
from csg_seg.errors import CSGError
from csg_seg.files import check_folder, write_tensors, writing, writing_into
from csg_seg.mm.checkpoints.writing import write_with_config
from csg_seg.mm.figures import save_figure
from csg_seg.mm.hooks.label_guard import LabelGuardHook
from csg_seg.mm.model import build_model
from csg_seg.report import Summary, summarise
from csg_seg.retrofitting.surgery import materialise

from .preflight import check_optimizer
from .work_dir import guard_checkpoints


@dataclass(frozen=True)
class Twin:
    """A trained network of a comparison, its last checkpoint, and its scores in percent."""

    name: str
    runner: Runner
    checkpoint: Path
    metrics: dict[str, float]
    summary: Summary


class CountHook(Hook):
    """Tell another process how far training is."""

    def __init__(self, done: MutableMapping[str, int], name: str):
        self.done, self.name = done, name

    def after_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        """Write the number of finished iterations."""
        self.done[self.name] = runner.iter + 1


def train(name: str, cfg: Config, done: MutableMapping[str, int], threads: int) -> None:
    """Train one network; for a process of its own.

    Args:
        name: its key in ``done``.
        cfg: iteration-based.
        done: takes the number of finished iterations.
        threads: to compute with on the CPU.
    """
    torch.set_num_threads(threads)
    with writing_into(cfg.work_dir), LabelGuardHook(cfg) as labels:
        runner = Runner.from_cfg(cfg)
        runner.register_hook(CountHook(done, name))
        runner.register_hook(labels)
        guard_checkpoints(runner)
        runner.train()


def train_all(cfgs: Mapping[str, Config]) -> None:
    """Train networks under a progress bar: on the CPU side by side, on a GPU one after the other."""
    workers = 1 if torch.cuda.is_available() else len(cfgs)
    threads = max(1, torch.get_num_threads() // workers)
    context = multiprocessing.get_context('spawn')
    bars = Progress(console=Console(stderr=True))
    with context.Manager() as manager, ProcessPoolExecutor(workers, mp_context=context) as pool, bars:
        done = manager.dict(dict.fromkeys(cfgs, 0))
        tasks = {name: bars.add_task(f'train {name}', total=cfg.train_cfg.max_iters) for name, cfg in cfgs.items()}
        runs = [pool.submit(train, name, cfg, done, threads) for name, cfg in cfgs.items()]
        while wait(runs, timeout=1, return_when=FIRST_EXCEPTION).not_done:
            for name, task in tasks.items():
                bars.update(task, completed=done[name])
            if any(run.done() and run.exception() for run in runs):
                break
        for task, run in zip(tasks.values(), runs, strict=True):
            run.result()
            bars.update(task, completed=bars.tasks[task].total)


def evaluate(name: str, cfg: Config) -> Twin:
    """Load the last checkpoint of a training and test it."""
    checkpoint = Path(cfg.work_dir, f'iter_{cfg.train_cfg.max_iters}.pth')
    cfg = deepcopy(cfg)
    cfg.update(load_from=str(checkpoint), experiment_name=f'{cfg.experiment_name}-test')
    runner = Runner.from_cfg(cfg)
    runner.register_hook(LabelGuardHook(cfg))
    scores = {key: float(value) for key, value in runner.test().items()}
    return Twin(name, runner, checkpoint, scores, summarise(runner.model))


def step_times(twins: Sequence[Twin], *, steps: int = 10, warmup: int = 2) -> list[list[float]]:
    """Time training steps in turn, one network after the other, on one batch.

    Returns:
        seconds of each step, for each network. The networks are trained on by them.
    """
    runners = [twin.runner for twin in twins]
    batch = next(iter(runners[0].build_dataloader(runners[0].cfg.train_dataloader, seed=0)))
    optimizers = [runner.build_optim_wrapper(runner.cfg.optim_wrapper) for runner in runners]
    seconds: list[list[float]] = [[] for _ in twins]
    for step in range(warmup + steps):
        for runner, optimizer, taken in zip(runners, optimizers, seconds, strict=True):
            runner.model.train()
            start = time.perf_counter()
            runner.model.train_step(deepcopy(batch), optimizer)
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if step >= warmup:
                taken.append(time.perf_counter() - start)
    return seconds


def draw_predictions(twins: Sequence[Twin], path: Path, *, samples: int = 6) -> None:
    """Save a picture of image, truth and each network's prediction, a row for each sample."""
    dataset = twins[0].runner.test_dataloader.dataset
    palette = np.array(dataset.metainfo['palette'], dtype=np.uint8)
    palette = np.concatenate([palette, np.full((256 - len(palette), 3), 255, dtype=np.uint8)])
    indices = sorted(np.random.default_rng(0).permutation(len(dataset))[:samples])
    titles = ['image', 'truth', *(f'{twin.name}: {twin.metrics["mIoU"]:.1f} mIoU' for twin in twins)]
    size = (2.2 * len(titles), 2.25 * len(indices))
    figure = Figure(figsize=size)
    axes = figure.subplots(len(indices), len(titles), squeeze=False)
    for row, index in zip(axes, indices, strict=True):
        sample = dataset[int(index)]
        truth = sample['data_samples'].gt_sem_seg.data[0].numpy()
        panels = [sample['inputs'].numpy()[::-1].transpose(1, 2, 0), palette[truth]]
        panels += [palette[_predict(twin, sample)] for twin in twins]
        for axis, panel in zip(row, panels, strict=True):
            axis.imshow(panel)
            axis.set_axis_off()
    for axis, title in zip(axes[0], titles, strict=True):
        axis.set_title(title, fontsize=10)
    figure.tight_layout()
    save_figure(figure, path, dpi=110)


def compare(dense: Config, csg: Config, work_dir: str | Path) -> dict[str, Any]:
    """Train both configs, and write picture, compact and materialised checkpoint into ``work_dir``.

    Raises:
        CSGError: a config is not an iteration-based one of segmentation.

    Returns:
        JSON-ready: a dict of figures for 'dense' and for 'csg', ``compression_ratio``,
        ``step_time_ratio`` (CSG over dense, median of alternating pairs), ``files`` and ``made_with``.
    """
    cfgs = {'dense': deepcopy(dense), 'csg': deepcopy(csg)}
    for name, cfg in cfgs.items():
        if 'decode_head' not in cfg.model or 'max_iters' not in cfg.train_cfg:
            raise CSGError(
                f'{name}: compare takes iteration-based configs of segmentation; tools/benchmark.py takes any'
            )
        check_optimizer(cfg, build_model(cfg))
    work_dir = Path(work_dir)
    check_folder(work_dir, given=f'--work-dir {work_dir}')
    work_dir.mkdir(parents=True, exist_ok=True)
    for name, cfg in cfgs.items():
        cfg.update(work_dir=str(work_dir / name), experiment_name=f'{name}-{time.time_ns()}', log_level='ERROR')
    train_all(cfgs)
    twins = [evaluate(name, cfg) for name, cfg in cfgs.items()]
    files = {
        'picture': work_dir / 'predictions.png',
        'compact checkpoint': work_dir / 'csg.safetensors',
        'materialised checkpoint': work_dir / 'materialised.pth',
    }
    draw_predictions(twins, files['picture'])
    _write_products(twins[1], files)
    seconds = step_times(twins)
    return {
        **{twin.name: _figures(twin, taken) for twin, taken in zip(twins, seconds, strict=True)},
        'compression_ratio': twins[1].summary.compression_ratio,
        'step_time_ratio': statistics.median(b / a for a, b in zip(*seconds, strict=True)),
        'files': {name: {'path': str(path), 'bytes': path.stat().st_size} for name, path in files.items()},
        'made_with': made_with(seed=twins[0].runner.seed),
    }


def _predict(twin: Twin, sample: dict) -> np.ndarray:
    with torch.no_grad():
        twin.runner.model.eval()
        prediction = twin.runner.model.test_step(pseudo_collate([sample]))[0]
    # A network of one score gives its two classes as floats.
    return prediction.pred_sem_seg.data[0].long().cpu().numpy()


def _write_products(csg: Twin, files: dict[str, Path]) -> None:
    model, names = csg.runner.model, csg.runner.test_dataloader.dataset.metainfo
    with writing(files['compact checkpoint']):
        write_with_config(model, model.state_dict(), files['compact checkpoint'], csg.runner.cfg, names)
    plain = materialise(deepcopy(model)).state_dict()
    write_tensors(files['materialised checkpoint'], {'meta': {'dataset_meta': names}, 'state_dict': plain})


def _figures(twin: Twin, seconds: Sequence[float]) -> dict[str, Any]:
    return {
        'stored_params': twin.summary.stored_params,
        'checkpoint_bytes': twin.checkpoint.stat().st_size,
        'mIoU': twin.metrics['mIoU'],
        'step_seconds': statistics.median(seconds),
    }
