"""Train a CSG config and its dense twin, and set side by side what they store, score and take."""

import platform
import statistics
import time
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mmengine
import numpy as np
import torch
from matplotlib.figure import Figure
from mmengine.config import Config
from mmengine.dataset import pseudo_collate
from mmengine.hooks import Hook
from mmengine.runner import Runner
from rich.console import Console
from rich.progress import Progress

from ..checkpoint import save_compact, write_whole
from ..report import Summary, summarise
from ..retrofit import materialise


@dataclass(frozen=True)
class Twin:
    """A trained network of a comparison, its last checkpoint, and its scores in percent."""

    name: str
    runner: Runner
    checkpoint: Path
    metrics: dict[str, float]
    summary: Summary


class ProgressHook(Hook):
    """Show training as a progress bar instead of log lines."""

    def __init__(self, progress: Progress, name: str):
        self.progress, self.name = progress, name

    def before_train(self, runner: Runner) -> None:
        """Add a bar."""
        self.task = self.progress.add_task(f'train {self.name}', total=runner.max_iters)

    def after_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        """Move the bar on."""
        self.progress.advance(self.task)


def train_twin(name: str, cfg: Config, work_dir: Path, progress: Progress) -> Twin:
    """Train and test one network by an iteration-based config.

    Args:
        name: what to call it; its folder in ``work_dir``.
        cfg: left as it is.
        work_dir: for logs and checkpoints.
        progress: takes a bar for the training.
    """
    cfg = deepcopy(cfg)
    cfg.update(work_dir=str(work_dir / name), experiment_name=f'{name}-{time.time_ns()}', log_level='ERROR')
    runner = Runner.from_cfg(cfg)
    runner.register_hook(ProgressHook(progress, name))
    runner.train()
    metrics = runner.test()
    checkpoint = Path(cfg.work_dir, f'iter_{runner.max_iters}.pth')
    scores = {key: float(value) for key, value in metrics.items()}
    return Twin(name, runner, checkpoint, scores, summarise(runner.model))


def step_times(twins: Sequence[Twin], *, steps: int = 10, warmup: int = 2) -> list[list[float]]:
    """Time training steps in turn, one network after the other, on one batch.

    Returns:
        seconds of each step, for each network. The networks are trained on by them.
    """
    batch = next(iter(twins[0].runner.train_dataloader))
    seconds: list[list[float]] = [[] for _ in twins]
    for step in range(warmup + steps):
        for twin, taken in zip(twins, seconds, strict=True):
            twin.runner.model.train()
            start = time.perf_counter()
            twin.runner.model.train_step(deepcopy(batch), twin.runner.optim_wrapper)
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
    figure.savefig(path, dpi=110)


def compare(dense: Config, csg: Config, work_dir: str | Path) -> dict[str, Any]:
    """Train both configs, and write picture, compact and materialised checkpoint into ``work_dir``.

    Returns:
        JSON-ready: a dict of figures for 'dense' and for 'csg', ``compression_ratio``,
        ``step_time_ratio`` (CSG over dense, median of alternating pairs), ``files`` and ``made_with``.
    """
    work_dir = Path(work_dir)
    work_dir.mkdir(parents=True, exist_ok=True)
    with Progress(console=Console(stderr=True)) as progress:
        twins = [train_twin(name, cfg, work_dir, progress) for name, cfg in (('dense', dense), ('csg', csg))]
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


def made_with(*, seed: int) -> dict[str, Any]:
    """Return the versions and the device that a result was measured with."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f'CPU, {torch.get_num_threads()} threads'
    versions = {'python': platform.python_version(), 'torch': torch.__version__, 'mmengine': mmengine.__version__}
    return {'seed': seed, 'device': device, **versions}


def _predict(twin: Twin, sample: dict) -> np.ndarray:
    with torch.no_grad():
        twin.runner.model.eval()
        prediction = twin.runner.model.test_step(pseudo_collate([sample]))[0]
    return prediction.pred_sem_seg.data[0].cpu().numpy()


def _write_products(csg: Twin, files: dict[str, Path]) -> None:
    save_compact(csg.runner.model, files['compact checkpoint'])
    plain = materialise(deepcopy(csg.runner.model))
    meta = {'dataset_meta': csg.runner.test_dataloader.dataset.metainfo}
    content = {'meta': meta, 'state_dict': plain.state_dict()}
    write_whole(files['materialised checkpoint'], lambda partial: torch.save(content, partial))


def _figures(twin: Twin, seconds: Sequence[float]) -> dict[str, Any]:
    return {
        'stored_params': twin.summary.stored_params,
        'checkpoint_bytes': twin.checkpoint.stat().st_size,
        'mIoU': twin.metrics['mIoU'],
        'step_seconds': statistics.median(seconds),
    }
