"""Compact files beside checkpoints: a killed run leaves none behind whose checkpoint mmengine has deleted."""

import shutil

import pytest
from conftest import ROOT
from mmengine.hooks import Hook
from mmengine.runner import Runner

from csg_seg import CSGError, load_compact, save_compact
from csg_seg.running.configs import read_config

DEMO = ROOT / 'configs' / 'demo' / 'csg-6x_deeplabv3_r18-d8-w32_drawn-voc-64x64.py'


@pytest.fixture
def runner(drawn, tmp_path):
    """Build a runner of the demo's config, which saves a checkpoint at every second iteration."""

    def build(iters, *, resume=False, **options):
        options = {f'default_hooks.checkpoint.{key}': value for key, value in options.items()}
        options |= {f'{split}_dataloader.dataset.data_root': str(drawn) for split in ('train', 'val', 'test')}
        options |= {'train_cfg.max_iters': iters, 'train_cfg.val_interval': 2, 'default_hooks.checkpoint.interval': 2}
        cfg = read_config(DEMO, {**options, 'train_dataloader.batch_size': 2, 'log_level': 'WARNING'})
        cfg.update(work_dir=str(tmp_path), resume=resume)
        return Runner.from_cfg(cfg)

    return build


class Kill(Hook):
    """End the process after CheckpointHook, and before CompactCheckpointHook, of an iteration."""

    def __init__(self, iteration):
        self.iteration = iteration

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        if runner.iter + 1 == self.iteration:
            raise KeyboardInterrupt


class Diverge(Hook):
    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        runner.model.decode_head.conv_seg.weight.data.fill_(float('nan'))


def names(folder, ending):
    return {path.stem for path in folder.glob(f'*.{ending}')}


def test_compact_files_are_written_and_deleted_with_their_checkpoints(runner, tmp_path):
    runner(6, max_keep_ckpts=2).train()
    assert names(tmp_path, 'pth') == names(tmp_path, 'safetensors') == {'iter_4', 'iter_6'}


def test_a_runner_without_a_config_of_its_model_writes_compact_files_too(runner, tmp_path):
    without = runner(2)
    without.cfg.pop('model')
    without.train()
    assert names(tmp_path, 'safetensors') == {'iter_2'}
    with pytest.raises(CSGError, match='does not say how its network is built'):
        load_compact(tmp_path / 'iter_2.safetensors')


def test_weights_that_are_not_finite_end_no_training(runner, tmp_path):
    diverging = runner(2)
    diverging.register_hook(Diverge())
    diverging.train()
    assert names(tmp_path, 'pth') == {'iter_2'} and names(tmp_path, 'safetensors') == set()
    (log,) = tmp_path.glob('*/*.log')
    (line,) = [line for line in log.read_text().splitlines() if 'Training continues' in line]
    assert 'iter_2.safetensors was not written. csg.0.weight holds NaN or infinite values' in line


def test_a_run_killed_between_two_deletions_leaves_no_orphan_once_resumed(runner, tmp_path):
    killed = runner(6, max_keep_ckpts=1)
    killed.register_hook(Kill(4), priority=95)
    with pytest.raises(KeyboardInterrupt):
        killed.train()
    assert names(tmp_path, 'pth') == {'iter_4'} and names(tmp_path, 'safetensors') == {'iter_2'}
    shutil.copy(tmp_path / 'iter_2.safetensors', tmp_path / 'mine.safetensors')
    shutil.copy(tmp_path / 'iter_2.safetensors', tmp_path / 'best_of_all.safetensors')
    save_compact(killed.model, tmp_path / 'iter_1.safetensors')
    (tmp_path / 'iter_3.safetensors').write_text('no compact file')
    (tmp_path / '.iter_4.safetensors.1.partial').write_text('half')
    runner(6, max_keep_ckpts=1, resume=True).train()
    assert names(tmp_path, 'pth') == {'iter_6'}
    assert names(tmp_path, 'safetensors') == {'iter_6', 'iter_1', 'iter_3', 'mine', 'best_of_all'}
    assert not [*tmp_path.glob('.*.partial')]


def test_compact_files_without_a_checkpoint_stay_if_mmengine_deletes_none(runner, tmp_path):
    runner(4, save_best='mIoU').train()
    (best,) = names(tmp_path, 'pth') - {'iter_2', 'iter_4'}
    assert best.startswith('best_mIoU_iter_') and best in names(tmp_path, 'safetensors')
    for name in ('iter_2', best):
        (tmp_path / f'{name}.pth').unlink()
    runner(6, save_best='mIoU', resume=True).train()
    # mmengine always deletes the best one before, and of the others none.
    left = names(tmp_path, 'safetensors') - {each for each in names(tmp_path, 'pth') if each.startswith('best_')}
    assert left == {'iter_2', 'iter_4', 'iter_6'}


def test_a_run_that_starts_from_scratch_deletes_nothing(runner, tmp_path):
    runner(2, max_keep_ckpts=1).train()
    for name in ('iter_2.pth', 'last_checkpoint'):
        (tmp_path / name).unlink()
    before = (tmp_path / 'iter_2.safetensors').read_bytes()
    runner(1, max_keep_ckpts=1, resume=True).train()
    assert (tmp_path / 'iter_2.safetensors').read_bytes() == before
