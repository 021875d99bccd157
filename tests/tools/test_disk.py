"""Disks that are full, and folders that nothing can be written in: one line, and nothing half-written."""

import errno
import functools
import os
import pickle
import resource
import threading
from contextlib import contextmanager
from pathlib import Path

import mmcv
import numpy as np
import pytest
import torch
from conftest import ROOT, cfg_options
from mmengine.hooks import Hook
from mmengine.runner import Runner
from safetensors.torch import save_file

from csg_seg import materialise
from csg_seg.cli.failures import one_line_errors
from csg_seg.errors import CSGError
from csg_seg.files import NotWrittenError, check_folder, write_tensors, write_whole, writing, writing_into
from csg_seg.mm.model import build_model
from csg_seg.running.configs import read_config

DEMO = ROOT / 'configs' / 'demo' / 'csg-6x_deeplabv3_r18-d8-w32_drawn-voc-64x64.py'
DENSE = DEMO.with_name(DEMO.name.removeprefix('csg-6x_'))
TABLE = ROOT / 'experiments' / 'runs' / 'tables' / 'camvid.yml'
RESNET20 = ROOT / 'configs' / 'cifar10' / 'resnet20_b64-20e_cifar10-npz.py'
# A folder of Linux that not even root writes in.
CLOSED = Path('/sys')


@contextmanager
def largest_file(size):
    """Let this process write no file beyond a size, as if the disk were full there."""
    _, hard = before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.fixture(scope='module')
def files(tmp_path_factory):
    """Checkpoints of the demo's network, CSG and dense, and an image."""
    folder = tmp_path_factory.mktemp('files')
    torch.manual_seed(0)
    model = build_model(read_config(DEMO))
    torch.save({'meta': {}, 'state_dict': model.state_dict()}, folder / 'csg.pth')
    torch.save({'meta': {}, 'state_dict': materialise(model).state_dict()}, folder / 'dense.pth')
    mmcv.imwrite(np.zeros((80, 80, 3), np.uint8), str(folder / 'image.png'))
    return folder


def small(drawn, **more):
    roots = {f'{split}_dataloader.dataset.data_root': str(drawn) for split in ('train', 'val', 'test')}
    steps = {'train_cfg.max_iters': 2, 'train_dataloader.batch_size': 2, 'default_hooks.checkpoint.interval': 1}
    return {**roots, **steps, **more}


WRITERS = {
    'torch.save of a path': lambda path: torch.save({'x': torch.zeros(10_000)}, path),
    'torch.save of a file': lambda path: write_tensors(path, {'x': torch.zeros(10_000)}),
    'safetensors': lambda path: save_file({'x': torch.zeros(10_000)}, path),
    'bytes': lambda path: path.write_bytes(bytes(40_000)),
}


@pytest.mark.parametrize('writer', [name for name in WRITERS if name != 'torch.save of a path'])
def test_a_file_that_does_not_fit_is_named_and_an_older_one_stays(writer, tmp_path):
    path = tmp_path / 'x'
    path.write_text('older')
    with largest_file(20_000), pytest.raises(NotWrittenError) as error:
        write_whole(path, WRITERS[writer])
    assert str(error.value).startswith(f'{path}: cannot be written ({os.strerror(errno.EFBIG)}); raise the limit')
    assert path.read_text() == 'older' and [*tmp_path.iterdir()] == [path]
    write_whole(path, WRITERS[writer])
    assert path.stat().st_size >= 40_000 and [*tmp_path.iterdir()] == [path]


@pytest.mark.parametrize(
    ('path', 'says'),
    [
        (
            '/sys/x/y',
            r'^/sys/x/y: cannot be written \((Operation not permitted|Permission denied|Read-only file system)',
        ),
        ('{}/file/x', r'/file/x: cannot be written \((File exists|Not a directory)\)'),
        ('{}/' + 'x' * 250, r'x: cannot be written \(File name too long\); give a shorter name'),
    ],
)
def test_a_place_where_nothing_can_be_written_is_named(path, says, tmp_path):
    (tmp_path / 'file').touch()
    with pytest.raises(NotWrittenError, match=says):
        write_whole(Path(path.format(tmp_path)), lambda partial: partial.write_text('x'))


def test_threads_that_write_one_file_leave_it_whole(tmp_path):
    path, began = tmp_path / 'x', threading.Barrier(2, timeout=10)

    def write(partial, letter):
        partial.write_text(letter)
        began.wait()
        with partial.open('a') as file:
            file.write(letter)

    threads = [
        threading.Thread(target=write_whole, args=(path, functools.partial(write, letter=each))) for each in 'AB'
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert path.read_text() in ('AA', 'BB') and [*tmp_path.iterdir()] == [path]


def test_errors_that_are_not_the_disks_stay_what_they_are(tmp_path):
    for error in (CSGError('mine'), TypeError('x'), RuntimeError('x'), OSError('no number')):
        with pytest.raises(type(error)) as raised, writing(tmp_path / 'x'):
            raise error
        assert raised.value is error
    for error in (FileNotFoundError(errno.ENOENT, 'gone', 'read.png'), RuntimeError('x')):
        with pytest.raises(type(error)) as raised, writing_into(tmp_path):
            raise error
        assert raised.value is error


@pytest.mark.parametrize(
    ('error', 'says'),
    [
        (FileNotFoundError('x.pth: no such file'), 'error: x.pth: no such file'),
        (
            PermissionError(errno.EACCES, 'Permission denied', 'x'),
            'error: x: Permission denied; change its permissions',
        ),
        (OSError(errno.ENOSPC, 'No space left on device'), 'error: a file: No space left on device; free space there'),
        (OSError('cannot identify\nimage file'), 'error: cannot identify image file'),
        (
            OSError('Caught OSError in process 0.\nTraceback (most recent):\n  File "x"\nOSError: no x\n'),
            'OSError: no x',
        ),
        (OSError(), 'error: OSError'),
    ],
)
def test_every_error_of_the_system_is_one_line(error, says):
    with pytest.raises(SystemExit) as end, one_line_errors():
        raise error
    assert says in end.value.code and '\n' not in end.value.code


def test_a_folder_is_tried_before_anything_is_computed(tmp_path):
    check_folder(tmp_path / 'a' / 'b', given='--x')
    assert not [*tmp_path.iterdir()]
    with pytest.raises(CSGError, match=r'^--x: nothing can be written in /sys \(.*; (change its|choose another)'):
        check_folder('/sys/a/b', given='--x')
    with largest_file(1000), pytest.raises(CSGError, match='File too large'):
        check_folder(tmp_path, given='--x')


def commands(files, drawn, image):
    """Return a command for each tool and experiment; it ends with the option that says where to write."""
    data, network = cfg_options(small(drawn)), [DEMO, files / 'csg.pth']
    tools = {
        'materialise.py': ([*network], '--out', 'x.pth'),
        'compact.py': ([*network], '--out', 'x.safetensors'),
        'demo.py': ([image, *network], '--out', 'x.png'),
        'export_onnx.py': ([*network, '--images', image], '--out', 'x.onnx'),
        'plan.py': ([DENSE, '--checkpoint', files / 'dense.pth', '--ratio', 2], '--out', 'x.py'),
        'report.py': ([DENSE, '--checkpoint', files / 'dense.pth'], '--curve', 'x.png'),
        'train.py': ([DEMO, *data], '--work-dir', 'x'),
        'test.py': ([*network, *data], '--work-dir', 'x'),
        'compare.py': ([DENSE, DEMO, *data], '--work-dir', 'x'),
        'experiments.runs': ([TABLE], '--work-dir', 'x'),
        'experiments.rivals': ([], '--work-dir', 'x'),
        'experiments.peers': ([TABLE], '--out', 'x.json'),
        'experiments.updates': ([TABLE], '--out', 'x.json'),
        'experiments.smaller_and_faster': ([TABLE], '--out', 'x.json'),
        'experiments.shipping': ([DENSE, files / 'dense.pth', *data], '--work-dir', 'x'),
        'experiments.carry_over': ([DENSE, files / 'dense.pth', *data], '--work-dir', 'x'),
        'experiments.federated': (['--network', 'a', *network, '*', *data], '--work-dir', 'x'),
        'model_converters/released2csg.py': ([files / 'csg.pth'], '--out', 'x.pth'),
        'model_converters/rename_weights.py': ([DENSE, files / 'dense.pth'], '--out', 'x.pth'),
        'experiments.speed': ([DEMO], '--out', 'x.json'),
        'experiments.inference': ([DEMO], '--out', 'x.json'),
        'experiments.scale': ([DENSE], '--picture', 'x.png'),
        'experiments.exchange': ([DENSE, DEMO], '--out', 'x.json'),
        'experiments.fits': ([RESNET20, files / 'dense.pth'], '--work-dir', 'x'),
        'experiments.zoo': (['--scope', 'torchvision', '--names', 'resnet18'], '--out', 'x.jsonl'),
    }
    return {tool: [*before, option, CLOSED / name] for tool, (before, option, name) in tools.items()}


def test_every_tool_and_experiment_refuses_a_folder_that_nothing_can_be_written_in(refused, files, drawn):
    found = commands(files, drawn, files / 'image.png')
    programs = {str(path.relative_to(ROOT / 'tools')) for path in ROOT.glob('tools/**/*.py')}
    programs |= {f'experiments.{path.parent.name}' for path in ROOT.glob('experiments/*/__main__.py')}
    # These two take their folder as a positional argument; they are tested below.
    assert programs == found.keys() | {'dataset_converters/draw_voc.py', 'dataset_converters/coco2voc.py'}
    for tool, command in found.items():
        message = refused(tool, *command)
        assert f'{command[-1]}: nothing can be written in {CLOSED}' in message, f'{tool}: {message}'


def test_folders_that_are_made_are_tried_too(refused, files, drawn, tmp_path):
    message = refused('dataset_converters/draw_voc.py', CLOSED)
    assert message.startswith(f'error: {CLOSED}') and 'cannot be written' in message
    for option in ('--out', '--show-dir'):
        tested = [DEMO, files / 'csg.pth', '--work-dir', tmp_path, option, CLOSED / 'x', *cfg_options(small(drawn))]
        assert f'{option} {CLOSED}/x: nothing can be written' in refused('test.py', *tested)


@pytest.mark.parametrize('tool', ['materialise.py', 'compact.py', 'train.py'])
def test_a_result_that_does_not_fit_leaves_nothing(refused, tool, files, drawn, tmp_path):
    *command, option, _ = commands(files, drawn, files / 'image.png')[tool]
    out = tmp_path / {'materialise.py': 'x.pth', 'compact.py': 'x.safetensors', 'train.py': 'run'}[tool]
    with largest_file(1_000_000):
        message = refused(tool, *command, option, out)
    name = out / 'iter_1.pth' if tool == 'train.py' else out
    assert f'{name}: cannot be written (File too large); raise the limit' in message
    assert ('use --resume to continue' in message) == (tool == 'train.py')
    assert not [path for path in tmp_path.rglob('*') if path.suffix in ('.pth', '.safetensors', '.partial')]


class FullForCompactFiles(Hook):
    """Let no large file be written after CheckpointHook, and before CompactCheckpointHook."""

    def __init__(self, steps):
        self.steps = steps
        self.before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        if runner.iter + 1 in self.steps:
            resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, self.before[1]))

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        self.after_train(runner)

    def after_train(self, runner):
        resource.setrlimit(resource.RLIMIT_FSIZE, self.before)


def test_training_outlives_a_compact_file_that_does_not_fit(drawn, tmp_path):
    cfg = read_config(DEMO, small(drawn, **{'train_cfg.max_iters': 4}))
    cfg.work_dir = str(tmp_path)
    (tmp_path / 'iter_2.safetensors').write_text('of an older run')
    runner = Runner.from_cfg(cfg)
    full = FullForCompactFiles(steps=[2, 3])
    runner.register_hook(full, priority=95)
    try:
        runner.train()
    finally:
        full.after_train(runner)
    assert {path.stem for path in tmp_path.glob('*.pth')} == {'iter_1', 'iter_2', 'iter_3', 'iter_4'}
    assert {path.stem for path in tmp_path.glob('*.safetensors')} == {'iter_1', 'iter_4'}
    (log,) = tmp_path.glob('*/*.log')
    warnings = [line for line in log.read_text().splitlines() if 'Training continues' in line]
    assert len(warnings) == 2
    for line, step in zip(warnings, (2, 3), strict=True):
        assert f'{tmp_path}/iter_{step}.safetensors: cannot be written (File too large)' in line
        assert 'tools/compact.py can make the file later' in line
    assert not list(tmp_path.rglob('*.partial'))


def test_the_error_comes_whole_out_of_another_process():
    error = NotWrittenError('file', 'cannot be written')
    again = pickle.loads(pickle.dumps(error))
    assert str(again) == str(error) == 'file: cannot be written'
    assert isinstance(again, OSError) and isinstance(again, CSGError)
