"""Run several processes on a machine without GPUs."""

import atexit
import gc
import os
import subprocess
from typing import Any

import torch
from mmengine.config import Config
from mmengine.logging import print_log

from csg_seg.errors import CSGError


def use_cpu_processes(cfg: Config) -> None:
    """Prepare a multi-process run on a machine without GPUs: gloo as backend, and BN instead of SyncBN.

    Does nothing if there is a GPU, or for a single process.

    Raises:
        CSGError: the launcher did not set an environment variable.
    """
    if cfg.launcher == 'none' or torch.cuda.is_available():
        return
    if cfg.launcher == 'slurm':
        _export_slurm_ranks()
    missing = [name for name in ('RANK', 'WORLD_SIZE', 'LOCAL_RANK', 'MASTER_ADDR') if name not in os.environ]
    if missing:
        raise CSGError(f'--launcher {cfg.launcher}: {missing[0]} is not set; start the run with tools/dist_train.sh')
    torch.distributed.init_process_group('gloo')
    # If threads of gloo are still running at exit, the process aborts.
    atexit.register(_leave_process_group)
    cfg.env_cfg.dist_cfg = dict(backend='gloo')
    wrapper = dict(
        type='MMDistributedDataParallel',
        broadcast_buffers=False,
        find_unused_parameters=cfg.get('find_unused_parameters', False),
    )
    cfg.model_wrapper_cfg = {**wrapper, **cfg.get('model_wrapper_cfg', {}), 'device_ids': None}
    if replace_sync_bn(cfg.model):
        print_log('No GPU: SyncBN is replaced with BN, and each process normalises its own batch.', logger='current')


def _leave_process_group() -> None:
    if torch.distributed.is_initialized():
        gc.collect()  # a reference cycle of model and runner keeps the process group alive
        torch.distributed.destroy_process_group()


def _export_slurm_ranks() -> None:
    names = {'RANK': 'SLURM_PROCID', 'WORLD_SIZE': 'SLURM_NTASKS', 'LOCAL_RANK': 'SLURM_LOCALID'}
    missing = [name for name in names.values() if name not in os.environ]
    if missing:
        raise CSGError(f'--launcher slurm: {missing[0]} is not set; start the run with srun or tools/slurm_train.sh')
    os.environ.update({ours: os.environ[slurms] for ours, slurms in names.items()})
    if 'MASTER_ADDR' not in os.environ:
        command = ['scontrol', 'show', 'hostnames', os.environ['SLURM_NODELIST']]
        os.environ['MASTER_ADDR'] = subprocess.check_output(command, text=True).split()[0]
    os.environ.setdefault('MASTER_PORT', '29500')


def replace_sync_bn(node: Any) -> int:
    """Replace every SyncBN in a config with BN, in place, and return their number."""
    if isinstance(node, (list, tuple)):
        return sum(map(replace_sync_bn, node))
    if not isinstance(node, dict):
        return 0
    found = node.get('type') == 'SyncBN'
    if found:
        node['type'] = 'BN'
    return found + sum(map(replace_sync_bn, node.values()))
