"""Trainings of a small segmentation network on drawn images, through either door."""

import time

from conftest import ROOT, SMALL_MODEL
from mmengine.config import Config
from mmengine.runner import Runner

DENSE = ROOT / 'configs' / 'deeplabv3' / 'deeplabv3_r18-d8_4xb4-20k_voc12-512x512.py'
CSG = DENSE.with_name(f'csg-s16-d128_{DENSE.name}')
SETTINGS = {'slice_shape': (16, 16, 3, 3), 'code_dim': 128}


def small_config(path, drawn, work_dir, *, iters: int = 3, **options) -> Config:
    """Return a config of the project, for a narrow network and a few iterations on drawn images."""
    cfg = Config.fromfile(path)
    plain = [dict(type='LoadImageFromFile'), dict(type='LoadAnnotations'), dict(type='PackSegInputs')]
    small = {**SMALL_MODEL, 'randomness.seed': 0, 'work_dir': str(work_dir), 'log_level': 'WARNING'}
    small['test_pipeline'] = plain
    small |= {'train_cfg.max_iters': iters, 'train_cfg.val_interval': 100, 'param_scheduler.0.end': iters}
    for split in ('train', 'val', 'test'):
        loader = f'{split}_dataloader'
        small |= {f'{loader}.num_workers': 0, f'{loader}.persistent_workers': False}
        small |= {f'{loader}.dataset.data_root': str(drawn), f'{loader}.dataset.pipeline': plain}
    cfg.merge_from_dict({**small, **options})
    cfg.experiment_name = f'test-{time.time_ns()}'
    return cfg


def train(cfg: Config) -> Runner:
    """Train, and return the Runner."""
    runner = Runner.from_cfg(cfg)
    runner.train()
    return runner


def hook_door(cfg: Config, **kwargs) -> Config:
    """Let CSGHook retrofit the model of a dense config."""
    cfg.merge_from_dict({'default_hooks.csg': dict(type='CSGHook', csg=SETTINGS, **kwargs)})
    return cfg
