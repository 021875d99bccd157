"""Train a CSG config, its dense counterpart and perhaps a narrower network; compare size, mIoU and step time."""

import statistics
import time
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from mmengine.config import Config
from mmengine.dataset import pseudo_collate
from mmengine.runner import Runner

from csg_seg.errors import CSGError
from csg_seg.files import check_folder, write_tensors, writing
from csg_seg.layers.bank import find_bank
from csg_seg.mm.checkpoints.writing import write_with_config
from csg_seg.mm.figures import save_figure
from csg_seg.mm.hooks.label_guard import LabelGuardHook
from csg_seg.mm.model import build_model
from csg_seg.report import Summary, summarise
from csg_seg.retrofitting.surgery import materialise

from .preflight import check_optimizer, check_starts
from .side_by_side import train_all, without_library_warnings


@dataclass(frozen=True)
class Trained:
    """A trained network with its last checkpoint and its scores in percent."""

    name: str
    runner: Runner
    checkpoint: Path
    scores: dict[str, float]
    summary: Summary


@without_library_warnings()
def compare(dense: Config, csg: Config, work_dir: str | Path, *, narrow: Config | None = None) -> dict[str, Any]:
    """Train two or three configs, and write a picture, a compact and a materialised checkpoint.

    Warnings of mmengine and mmseg are hidden.

    Args:
        dense: an iteration-based segmentation config.
        csg: its CSG config.
        work_dir: folder to write to.
        narrow: a dense config with fewer channels, to compare with.

    Returns:
        A dict of numbers for 'dense', 'csg' and 'narrow', ``compression_ratio``, ``step_time_ratio`` (CSG over
        dense, median over pairs of steps), ``files`` and ``seed``. It can be written as JSON.

    Raises:
        CSGError: a config is not an iteration-based segmentation config, or is wrong.
        FileNotFoundError: a config names a checkpoint that does not exist.
    """
    cfgs = {'dense': deepcopy(dense), 'csg': deepcopy(csg)}
    if narrow is not None:
        cfgs['narrow'] = deepcopy(narrow)
    for name, cfg in cfgs.items():
        if 'decode_head' not in cfg.model or 'max_iters' not in cfg.train_cfg:
            raise CSGError(f'{name}: not an iteration-based segmentation config; compare works with these only')
        model = build_model(cfg)
        check_optimizer(cfg, model)
        check_starts(cfg)
        if (find_bank(model) is not None) != (name == 'csg'):
            wanted = 'a CSG config, this one is dense' if name == 'csg' else 'a dense config, this one is a CSG config'
            raise CSGError(f'{name}: give {wanted}')
    work_dir = Path(work_dir)
    check_folder(work_dir, given=f'--work-dir {work_dir}')
    work_dir.mkdir(parents=True, exist_ok=True)
    for name, cfg in cfgs.items():
        cfg.update(work_dir=str(work_dir / name), experiment_name=f'{name}-{time.time_ns()}', log_level='ERROR')
    train_all(cfgs)
    networks = [_evaluate(name, cfg) for name, cfg in cfgs.items()]
    files = {
        'picture': work_dir / 'predictions.png',
        'compact checkpoint': work_dir / 'csg.safetensors',
        'materialised checkpoint': work_dir / 'materialised.pth',
    }
    draw_predictions(networks, files['picture'])
    _write_checkpoints(networks[1], files)
    seconds = step_times([each.runner for each in networks])
    return {
        **{each.name: _numbers(each, taken) for each, taken in zip(networks, seconds, strict=True)},
        'compression_ratio': networks[1].summary.compression_ratio,
        'step_time_ratio': statistics.median(b / a for a, b in zip(*seconds[:2], strict=True)),
        'files': {name: {'path': str(path), 'bytes': path.stat().st_size} for name, path in files.items()},
        'seed': networks[0].runner.seed,
    }


def step_times(runners: Sequence[Runner], *, steps: int = 10, warmup: int = 2) -> list[list[float]]:
    """Measure training steps on one batch, alternating between networks.

    Args:
        runners: runners of the networks, which are trained further.
        steps: number of steps to measure.
        warmup: number of steps before them.

    Returns:
        Seconds of each step, for each network.
    """
    batch = next(iter(runners[0].build_dataloader(runners[0].cfg.train_dataloader, seed=0)))
    optimizers = [runner.build_optim_wrapper(runner.cfg.optim_wrapper) for runner in runners]
    seconds: list[list[float]] = [[] for _ in runners]
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


def draw_predictions(networks: Sequence[Trained], path: Path, *, samples: int = 6) -> None:
    """Save a picture with a row for each sample: image, truth and the prediction of each network."""
    dataset = networks[0].runner.test_dataloader.dataset
    palette = np.array(dataset.metainfo['palette'], dtype=np.uint8)
    palette = np.concatenate([palette, np.full((256 - len(palette), 3), 255, dtype=np.uint8)])
    indices = sorted(np.random.default_rng(0).permutation(len(dataset))[:samples])
    titles = ['image', 'truth', *(f'{each.name}: {each.scores["mIoU"]:.1f} mIoU' for each in networks)]
    figure = Figure(figsize=(2.2 * len(titles), 2.25 * len(indices)))
    axes = figure.subplots(len(indices), len(titles), squeeze=False)
    for row, index in zip(axes, indices, strict=True):
        sample = dataset[int(index)]
        truth = sample['data_samples'].gt_sem_seg.data[0].numpy()
        panels = [sample['inputs'].numpy()[::-1].transpose(1, 2, 0), palette[truth]]
        panels += [palette[_predict(each.runner, sample)] for each in networks]
        for axis, panel in zip(row, panels, strict=True):
            axis.imshow(panel)
            axis.set_axis_off()
    for axis, title in zip(axes[0], titles, strict=True):
        axis.set_title(title, fontsize=10)
    figure.tight_layout()
    save_figure(figure, path, dpi=110)


def _evaluate(name: str, cfg: Config) -> Trained:
    """Load the last checkpoint of a training and test it."""
    checkpoint = Path(cfg.work_dir, f'iter_{cfg.train_cfg.max_iters}.pth')
    cfg = deepcopy(cfg)
    cfg.update(load_from=str(checkpoint), experiment_name=f'{cfg.experiment_name}-test')
    runner = Runner.from_cfg(cfg)
    runner.register_hook(LabelGuardHook(cfg))
    scores = {key: float(value) for key, value in runner.test().items()}
    return Trained(name, runner, checkpoint, scores, summarise(runner.model))


@torch.no_grad()
def _predict(runner: Runner, sample: dict) -> np.ndarray:
    runner.model.eval()
    prediction = runner.model.test_step(pseudo_collate([sample]))[0]
    # A network with one score predicts its two classes as floats.
    return prediction.pred_sem_seg.data[0].long().cpu().numpy()


def _write_checkpoints(csg: Trained, files: Mapping[str, Path]) -> None:
    model, metainfo = csg.runner.model, csg.runner.test_dataloader.dataset.metainfo
    with writing(files['compact checkpoint']):
        write_with_config(model, model.state_dict(), files['compact checkpoint'], csg.runner.cfg, metainfo)
    plain = materialise(deepcopy(model)).state_dict()
    write_tensors(files['materialised checkpoint'], {'meta': {'dataset_meta': metainfo}, 'state_dict': plain})


def _numbers(network: Trained, seconds: Sequence[float]) -> dict[str, Any]:
    return {
        'stored_params': network.summary.stored_params,
        'checkpoint_bytes': network.checkpoint.stat().st_size,
        'steps': network.runner.cfg.train_cfg.max_iters,
        'mIoU': network.scores['mIoU'],
        'step_seconds': statistics.median(seconds),
    }
