"""Runs that cannot be resumed: one line says why, and how to go on."""

import shutil

import pytest
import torch
from conftest import ROOT, cfg_options, run_tool

from csg_seg import materialise
from csg_seg.mm.checkpoints.reading import read_checkpoint
from csg_seg.mm.model import build_model
from csg_seg.running.configs import read_config

DEMO = ROOT / 'configs' / 'demo' / 'csg-6x_deeplabv3_r18-d8-w32_drawn-voc-64x64.py'


def arguments(drawn, work_dir, **options):
    options |= {f'{split}_dataloader.dataset.data_root': drawn for split in ('train', 'val', 'test')}
    options = {'train_cfg.max_iters': 4, **options}
    options |= {'train_dataloader.batch_size': 2, 'default_hooks.checkpoint.interval': 1}
    adamw = work_dir.parent / 'adamw.py'  # whose state counts its steps
    adamw.write_text(
        f"_base_ = {str(DEMO)!r}\noptim_wrapper = dict(optimizer=dict(_delete_=True, type='AdamW', lr=3e-3))\n"
    )
    return [adamw, '--work-dir', work_dir, *cfg_options(options)]


@pytest.fixture(scope='module')
def trained(drawn, tmp_path_factory):
    """The work folder of a run that was broken off after two iterations."""
    folder = tmp_path_factory.mktemp('trained') / 'run'
    run_tool('train.py', *arguments(drawn, folder))
    for path in (*folder.glob('iter_3.*'), *folder.glob('iter_4.*')):
        path.unlink()
    (folder / 'last_checkpoint').write_text(str(folder / 'iter_2.pth'))
    return folder


@pytest.fixture
def run(trained, tmp_path):
    """A copy of that folder, which says nothing of the other."""
    folder = shutil.copytree(trained, tmp_path / 'run')
    (folder / 'last_checkpoint').write_text(str(folder / 'iter_2.pth'))
    return folder


@pytest.fixture
def refused(refused, drawn, run):
    """Resume, and return the one line it ends with."""
    return lambda **options: refused('train.py', *arguments(drawn, run, **options), '--resume')


@pytest.mark.parametrize(
    ('content', 'says'),
    [
        (b'', 'does not name the checkpoint to resume from'),
        (b' \n', 'does not name the checkpoint to resume from'),
        (b'\xff\xfe\x00', 'does not name the checkpoint to resume from'),
        (b'gone/iter_9.pth', 'names gone/iter_9.pth: no such file'),
        (b'.', 'names .: a folder'),
        (None, 'a folder, not the name of the checkpoint'),
    ],
)
def test_a_note_that_names_no_checkpoint_is_named(refused, run, content, says):
    note = run / 'last_checkpoint'
    note.unlink()
    note.mkdir() if content is None else note.write_bytes(content)
    message = refused()
    assert f'{note}' in message and says in message
    assert message.endswith(f'; add --cfg-options load_from={run}/iter_2.pth')
    for path in run.glob('*.pth'):
        path.unlink()
    said = refused()
    assert 'delete it to start from the beginning, or begin another run with the weights of ' in said
    assert said.endswith('.safetensors: give it as load_from, and another --work-dir')
    for path in run.glob('*.safetensors'):
        path.unlink()
    assert refused().endswith('; delete it to start from the beginning')


def test_what_the_line_says_resumes(run, drawn):
    (run / 'last_checkpoint').write_text('')
    options = arguments(drawn, run, load_from=run / 'iter_2.pth')
    run_tool('train.py', *options, '--resume')
    before, after = (torch.load(run / f'iter_{step}.pth', weights_only=False)['optimizer'] for step in (2, 4))
    steps = [each['state'][0]['step'].item() for each in (before, after)]
    assert steps == [2, 4]  # the optimizer went on where it was
    assert (run / 'last_checkpoint').read_text() == str(run / 'iter_4.pth')


def test_a_latest_checkpoint_that_is_cut_short_or_compact_is_named(refused, run):
    (run / 'iter_2.pth').write_bytes((run / 'iter_1.pth').read_bytes()[:-100])
    message = refused()
    assert 'iter_2.pth: damaged, it is cut short' in message
    assert message.endswith(f'or add --cfg-options load_from={run}/iter_1.pth to resume from an earlier one')
    (run / 'last_checkpoint').write_text(str(run / 'iter_2.safetensors'))
    assert 'a compact checkpoint has no training state to resume' in refused()


@pytest.mark.parametrize(
    ('options', 'says'),
    [
        (
            {'optim_wrapper.paramwise_cfg.custom_keys.decode_head.lr_mult': 10},
            'an optimizer of 1 parameter groups, and the config makes 92;',
        ),
        (
            {'optim_wrapper.optimizer.type': 'SGD', 'optim_wrapper.optimizer.momentum': 0.9},
            "another kind of optimizer (betas), not the config's (momentum)",
        ),
        ({'optim_wrapper.optimizer.type': 'Adagrad'}, "not the config's (lr_decay)"),
    ],
)
def test_another_optimizer_than_the_checkpoints_is_named(refused, run, options, says):
    message = refused(**options)
    assert f'{run}/iter_2.pth was saved by ' in message and says in message
    assert message.endswith(f'new run with its weights: --cfg-options load_from={run}/iter_2.pth, without --resume')


def test_another_number_of_parameters_is_named(refused, run):
    checkpoint = torch.load(run / 'iter_2.pth', weights_only=False)
    group = checkpoint['optimizer']['param_groups'][0]
    count = len(group['params'])
    group['params'].pop()
    torch.save(checkpoint, run / 'iter_2.pth')
    said = f'an optimizer of {count - 1} parameters in group 0, and the config puts {count} there'
    assert said in refused()


def test_a_dense_checkpoint_of_a_generated_network_is_named(refused, run):
    checkpoint = torch.load(run / 'iter_2.pth', weights_only=False)
    model = build_model(read_config(DEMO))
    checkpoint['state_dict'] = materialise(model).state_dict()
    torch.save(checkpoint, run / 'iter_2.pth')
    message = refused()
    assert f'{run}/iter_2.pth: the run would resume from a dense checkpoint; begin a new run with it' in message


def test_weights_without_training_state_are_no_run_to_resume(refused, run):
    torch.save({'meta': {}, 'state_dict': read_checkpoint(run / 'iter_2.pth')['state_dict']}, run / 'weights.pth')
    message = refused(load_from=run / 'weights.pth')
    assert f'{run}/weights.pth holds weights and no training state to resume; begin a new run' in message


def test_a_run_of_several_parameter_groups_resumes(drawn, tmp_path):
    options = {'optim_wrapper.paramwise_cfg.custom_keys.decode_head.lr_mult': 10, 'train_cfg.max_iters': 2}
    run_tool('train.py', *arguments(drawn, tmp_path, **options))
    run_tool('train.py', *arguments(drawn, tmp_path, **options | {'train_cfg.max_iters': 3}), '--resume')
    assert (tmp_path / 'iter_3.pth').is_file()
