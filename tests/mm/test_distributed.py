"""Two processes on the CPU: the launcher scripts, gloo, DDP, and activation checkpointing under it."""

import json
import os
import re
import socket
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, SMALL_MODEL, cfg_options, run_program, run_tool
from mmengine.config import Config

from csg_seg.mm.checkpoints.reading import read_checkpoint
from csg_seg.mm.model import build_model

CONFIGS = ROOT / 'configs' / 'deeplabv3'
DENSE = CONFIGS / 'deeplabv3_r18-d8_4xb4-20k_voc12-512x512.py'
CSG = DENSE.with_name(f'csg-s16-d128_{DENSE.name}')
ITERS = 4


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(('127.0.0.1', 0))
        return probe.getsockname()[1]


def write_config(path: Path, base: Path, *, extra: str = '') -> Path:
    """Write a config without randomness: no augmentation, no dropout, BN in eval mode."""
    path.write_text(
        f"""_base_ = {str(base)!r}
custom_imports = dict(imports=['csg_seg', 'ddp_hooks'])
model = dict(decode_head=dict(dropout_ratio=0), auxiliary_head=dict(dropout_ratio=0))
default_hooks = dict(observe=dict(type='ObserveHook'))
pipeline = [dict(type='LoadImageFromFile'), dict(type='LoadAnnotations'), dict(type='PackSegInputs')]
train_dataloader = dict(dataset=dict(pipeline=pipeline))
{extra}"""
    )
    return path


def write_plain_config(path: Path) -> Path:
    """Write a CSG config whose crops fit the small drawn images."""
    pipeline = "[dict(type='LoadImageFromFile'), dict(type='LoadAnnotations'), dict(type='PackSegInputs')]"
    path.write_text(f'_base_ = {str(CSG)!r}\ntrain_dataloader = dict(dataset=dict(pipeline={pipeline}))\n')
    return path


def options(drawn: Path, batch_size: int) -> list[str]:
    small = {**SMALL_MODEL, 'randomness.seed': 0, 'train_dataloader.batch_size': batch_size}
    small |= {'train_cfg.max_iters': ITERS, 'train_cfg.val_interval': 100, 'param_scheduler.0.end': ITERS}
    small |= {'default_hooks.checkpoint.interval': ITERS}
    for split in ('train', 'val', 'test'):
        loader = f'{split}_dataloader'
        small |= {f'{loader}.num_workers': 0, f'{loader}.persistent_workers': False}
        small |= {f'{loader}.dataset.data_root': drawn}
    return cfg_options(small)


HOOKS = '''
"""Watch a run: BN stays in eval mode, the loss is averaged over ranks, parameters are compared."""
import json
from pathlib import Path

import torch
from mmengine.dist import all_gather, get_rank
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from torch import nn


@HOOKS.register_module()
class ObserveHook(Hook):
    priority = 'LOWEST'

    def __init__(self):
        self.losses = []

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        for module in runner.model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        self.losses.append(torch.stack(all_gather(outputs['loss'].detach())).mean().item())

    def after_train(self, runner):
        whole = torch.cat([parameter.detach().flatten() for parameter in runner.model.parameters()])
        identical = all(torch.equal(whole, other) for other in all_gather(whole))
        kind = type(runner.model).__name__
        if get_rank() == 0:
            seen = dict(losses=self.losses, identical=identical, kind=kind)
            Path(runner.work_dir, 'seen.json').write_text(json.dumps(seen))
'''


OTHER_MACHINE = '''
"""On the second rank, a fit's basis has the other sign, as another machine's libraries may give it."""
import os

from csg_seg import fitting

if os.environ['RANK'] == '1':
    nearest_basis = fitting._nearest_basis
    fitting._nearest_basis = lambda *args: -nearest_basis(*args)
'''


KILLER = '''
"""The second rank is killed once, between two checkpoints."""
import os
import signal
from pathlib import Path

from mmengine.dist import get_rank
from mmengine.hooks import Hook
from mmengine.registry import HOOKS


@HOOKS.register_module()
class KillHook(Hook):
    def before_train_iter(self, runner, batch_idx, data_batch=None):
        killed = Path(runner.work_dir, 'killed')
        if get_rank() == 1 and runner.iter == 3 and not killed.exists():
            killed.touch()
            os.kill(os.getpid(), signal.SIGKILL)
'''


@pytest.fixture(scope='module')
def launch(drawn, tmp_path_factory):
    """Train in one process or in two; return what was seen and the final weights."""
    folder = tmp_path_factory.mktemp('ddp')
    (folder / 'ddp_hooks.py').write_text(HOOKS)
    (folder / 'other_machine.py').write_text(OTHER_MACHINE)
    (folder / 'killer.py').write_text(KILLER)

    def train(name: str, base: Path, *more: str, processes: int, batch_size: int, extra: str = '', restarts: int = 0):
        config = write_config(folder / f'{name}.py', base, extra=extra)
        work_dir = folder / name
        arguments = ['--work-dir', work_dir, *options(drawn, batch_size), *more]
        threads = {'OMP_NUM_THREADS': '1', 'PYTHONPATH': str(folder), 'PYTHON': sys.executable}
        env = {**os.environ, **threads, 'PORT': str(free_port()), 'MAX_RESTARTS': str(restarts)}
        if processes == 1:
            run_program(sys.executable, ROOT / 'tools' / 'train.py', config, *arguments, env=env)
        else:
            run_program('bash', ROOT / 'tools' / 'dist_train.sh', config, processes, *arguments, env=env)
        weights = read_checkpoint(work_dir / f'iter_{ITERS}.pth')['state_dict']
        return json.loads((work_dir / 'seen.json').read_text()), weights

    return train


@pytest.fixture(scope='module')
def two(launch):
    return launch('two', CSG, processes=2, batch_size=2)


def assert_close(weights, others):
    assert weights.keys() == others.keys()
    for name, tensor in weights.items():
        torch.testing.assert_close(tensor, others[name], rtol=1e-4, atol=1e-5, msg=lambda m, name=name: f'{name}: {m}')


def test_two_processes_equal_one_at_twice_the_batch(launch, two):
    seen, weights = two
    alone, expected = launch('one', CSG, processes=1, batch_size=4)
    assert seen['kind'] == 'MMDistributedDataParallel' and alone['kind'] == 'EncoderDecoder'
    assert seen['identical']
    assert len(seen['losses']) == ITERS
    assert seen['losses'] == pytest.approx(alone['losses'], rel=1e-4)
    assert alone['losses'][-1] != alone['losses'][0]
    assert_close(weights, expected)


@pytest.mark.full
def test_hook_door_equals_model_door_under_ddp(launch, two):
    seen, weights = two
    csg = "default_hooks['csg'] = dict(type='CSGHook', csg=dict(slice_shape=(16, 16, 3, 3), code_dim=128))\n"
    by_hook, others = launch('hook', DENSE, processes=2, batch_size=2, extra=csg)
    assert by_hook['kind'] == 'MMDistributedDataParallel' and by_hook['identical']
    assert by_hook['losses'] == seen['losses']
    assert all(torch.equal(weights[name], others[name]) for name in weights)


@pytest.mark.full
def test_activation_checkpointing_under_ddp_changes_nothing(launch, two):
    extra = "model['backbone'] = dict(with_cp=True)\nmodel_wrapper_cfg = dict(static_graph=True)\n"
    seen, weights = launch('with_cp', CSG, processes=2, batch_size=2, extra=extra)
    assert seen['identical']
    assert seen['losses'] == pytest.approx(two[0]['losses'], rel=1e-5)
    assert_close(weights, two[1])


def test_two_processes_share_one_fit_and_learn_from_one_teacher(launch, tmp_path):
    cfg = Config.fromfile(DENSE)
    cfg.merge_from_dict(SMALL_MODEL)
    torch.save({'state_dict': build_model(cfg).state_dict()}, tmp_path / 'dense.pth')
    # By load_from, since mmengine shares itself what init_cfg loads.
    extra = f"custom_imports['imports'].append('other_machine')\nload_from = {str(tmp_path / 'dense.pth')!r}\n"
    extra += f"model['teacher'] = dict(checkpoint={str(tmp_path / 'dense.pth')!r}, features=1.0)\n"
    seen, weights = launch('taught', CSG, processes=2, batch_size=2, extra=extra)
    assert seen['kind'] == 'MMDistributedDataParallel' and seen['identical']
    assert not any('teacher' in name for name in weights)


def test_a_killed_worker_is_started_again_and_nothing_is_lost(launch, two):
    extra = "custom_imports['imports'].append('killer')\ndefault_hooks['kill'] = dict(type='KillHook')\n"
    every_second = ['default_hooks.checkpoint.interval=2', '--resume']
    seen, weights = launch('killed', CSG, *every_second, processes=2, batch_size=2, extra=extra, restarts=1)
    assert seen['losses'] == two[0]['losses'][2:], 'it went on from the checkpoint after two of four steps'
    assert all(torch.equal(tensor, two[1][name]) for name, tensor in weights.items())


@pytest.mark.full
def test_slurm_script_trains_two_cpu_processes(drawn, tmp_path):
    srun = tmp_path / 'srun'
    srun.write_text(
        f"""#!{sys.executable}
# Stands in for slurm's launcher: starts the command's tasks on this machine.
import os, subprocess, sys
arguments = sys.argv[1:]
ntasks = next(int(each.split('=')[1]) for each in arguments if each.startswith('--ntasks='))
assert not any(each.startswith('--gres') for each in arguments)
command = arguments[next(i for i, each in enumerate(arguments) if each.endswith('python') or 'python3' in each):]
tasks = []
for rank in range(ntasks):
    names = dict(SLURM_PROCID=str(rank), SLURM_LOCALID=str(rank), SLURM_NTASKS=str(ntasks))
    tasks.append(subprocess.Popen(command, env=dict(os.environ, **names)))
sys.exit(max(task.wait() for task in tasks))
"""
    )
    srun.chmod(0o755)
    slurm = {'GRES': '', 'GPUS': '2', 'GPUS_PER_NODE': '2', 'MASTER_ADDR': '127.0.0.1', 'MASTER_PORT': str(free_port())}
    path = f'{tmp_path}:{os.environ["PATH"]}'
    env = {**os.environ, **slurm, 'PATH': path, 'PYTHON': sys.executable, 'OMP_NUM_THREADS': '1'}
    config = write_plain_config(tmp_path / 'small.py')
    arguments = ['cpu', 'job', config, '--work-dir', tmp_path / 'work', *options(drawn, 2)]
    run_program('bash', ROOT / 'tools' / 'slurm_train.sh', *arguments, env=env)
    arguments = ['cpu', 'job', config, tmp_path / 'work' / f'iter_{ITERS}.pth', '--work-dir', tmp_path / 'work']
    env['MASTER_PORT'] = str(free_port())
    tested = run_program('bash', ROOT / 'tools' / 'slurm_test.sh', *arguments, *options(drawn, 2), env=env)
    assert 'mIoU' in tested.stdout


def test_dist_test_scores_as_one_process_does(drawn, tmp_path):
    config = write_plain_config(tmp_path / 'small.py')
    work_dir = ['--work-dir', tmp_path / 'work']
    run_tool('train.py', config, *work_dir, *options(drawn, 2))
    checkpoint = tmp_path / 'work' / f'iter_{ITERS}.pth'
    env = {**os.environ, 'PYTHON': sys.executable, 'OMP_NUM_THREADS': '1', 'PORT': str(free_port())}
    arguments = [config, checkpoint, 2, *work_dir, *options(drawn, 2)]
    two = run_program('bash', ROOT / 'tools' / 'dist_test.sh', *arguments, env=env)
    one = run_tool('test.py', config, checkpoint, *work_dir, *options(drawn, 2))
    scores = [re.findall(r'mIoU: ([\d.]+)', done.stdout)[-1] for done in (one, two)]
    assert scores[0] == scores[1]
