"""What ``make demo`` runs, with trainings of two steps."""

import json
import re
import shlex

import mmcv
import pytest
from conftest import ROOT, cfg_options, run_tool
from mmengine.config import Config
from mmseg.datasets import PascalVOCDataset

from csg_seg.deploy.inference import load_network
from csg_seg.storage.format import read_compact

DEMO = ROOT / 'configs' / 'demo' / 'csg-6x_deeplabv3_r18-d8-w32_drawn-voc-64x64.py'
DENSE = DEMO.with_name(DEMO.name.removeprefix('csg-6x_'))
NARROW = DENSE.with_name(DENSE.name.replace('w32', 'w13'))
MAKEFILE = (ROOT / 'Makefile').read_text()


@pytest.fixture(scope='module')
def compared(drawn, tmp_path_factory):
    """The folder of a comparison, what it printed, and its messages."""
    folder = tmp_path_factory.mktemp('compared')
    options = {f'{split}_dataloader.dataset.data_root': drawn for split in ('train', 'val', 'test')}
    options |= {'train_cfg.max_iters': 2, 'default_hooks.checkpoint.interval': 2, 'train_dataloader.batch_size': 2}
    options['optim_wrapper.paramwise_cfg.custom_keys.csg.lr_mult'] = 0.3  # mmengine logs such settings
    files = ['--narrow', NARROW, '--work-dir', folder, '--out', folder / 'result.json']
    command = [DENSE, DEMO, *files, *cfg_options(options), '--json']
    done = run_tool('compare.py', *command)
    return folder, json.loads(done.stdout), done.stderr


def test_the_result_is_what_is_printed_and_every_file_is_there(compared):
    folder, printed, _ = compared
    assert json.loads((folder / 'result.json').read_text()) == printed
    assert 1 <= printed['narrow']['stored_params'] / printed['csg']['stored_params'] < 1.02
    assert [printed[name]['steps'] for name in ('dense', 'csg', 'narrow')] == [2, 2, 2]
    assert printed['compression_ratio'] == printed['dense']['stored_params'] / printed['csg']['stored_params']
    assert printed['files'].keys() == {'picture', 'compact checkpoint', 'materialised checkpoint'}
    for file in printed['files'].values():
        assert (folder / file['path']).stat().st_size == file['bytes'] > 0


def test_no_warning_of_a_library_is_shown(compared):
    *_, messages = compared
    assert 'train dense' in messages and 'Warning' not in messages


def test_all_networks_of_the_demo_have_one_recipe():
    dense, csg, narrow = (Config.fromfile(path) for path in (DENSE, DEMO, NARROW))
    for key in ('train_cfg', 'optim_wrapper', 'param_scheduler', 'train_dataloader'):
        assert csg[key] == narrow[key] == dense[key]


def test_a_wrong_start_is_refused_before_anything_is_trained(refused, tmp_path, drawn):
    data = {f'{split}_dataloader.dataset.data_root': drawn for split in ('train', 'val', 'test')}
    teacher = "model = dict(teacher=dict(checkpoint='absent.pth', model=dict(type='EncoderDecoder')))"
    (tmp_path / 'taught.py').write_text(f'_base_ = {str(DEMO)!r}\n{teacher}\n')
    taught = [DENSE, tmp_path / 'taught.py', '--work-dir', tmp_path / 'out']
    assert 'absent.pth: no such file' in refused('compare.py', *taught, *cfg_options(data))
    assert not (tmp_path / 'out').exists()


def test_the_compact_file_is_enough_to_look_at_an_image(compared, drawn):
    folder, *_ = compared
    compact = read_compact(folder / 'csg.safetensors')
    assert compact.source['builder'] == 'mmengine'
    (rule,) = re.findall(r'^demo:.*\n((?:\t.*\n)*)', MAKEFILE, flags=re.MULTILINE)
    *_, last = rule.replace('\\\n', ' ').strip().splitlines()
    program, tool, image, checkpoint, *options = shlex.split(last)
    assert program == '$(VENV)/bin/csg-seg' and tool == 'demo' and checkpoint == 'work_dirs/demo/csg.safetensors'
    image = drawn / 'JPEGImages' / 'val_00003.jpg'
    options = [each.replace('work_dirs/demo', str(folder)) for each in options]
    seen = folder / 'seen.png'
    assert str(seen) in options
    classes = {*PascalVOCDataset.METAINFO['classes']}
    dense = [DENSE, folder / 'materialised.pth']
    for given in ([folder / 'csg.safetensors'], [DEMO, folder / 'csg.safetensors'], dense):
        for _ in range(2 if given is dense else 1):  # it may be repeated
            printed = run_tool('demo.py', image, *given, *options).stdout.splitlines()
            assert {line.split('%')[1].strip() for line in printed[:-1]} <= classes
            assert printed[-1] == f'drawn: {seen}' and mmcv.imread(str(seen)).shape == (6 * 64, 6 * 64, 3)


def test_all_files_of_a_comparison_name_the_classes(compared):
    folder, *_ = compared
    given = [(None, 'csg.safetensors'), (DEMO, 'csg/iter_2.pth'), (DENSE, 'dense/iter_2.pth')]
    given += [(DEMO, 'csg.safetensors'), (DENSE, 'materialised.pth')]
    for config, name in given:
        found = load_network(config, folder / name).dataset_meta
        assert [*found['classes']] == [*PascalVOCDataset.METAINFO['classes']]
        assert [*map(list, found['palette'])] == PascalVOCDataset.METAINFO['palette']
