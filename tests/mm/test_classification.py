"""Image classifiers through the tools: train, resume, test, several seeds; ImageNet, one process and two."""

import json
import re
import shlex
import shutil
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, cfg_options, run_program, run_tool
from mmengine.config import Config

from csg_seg.errors import CSGError
from csg_seg.mm.checkpoints.reading import read_checkpoint
from csg_seg.mm.hooks.channels_last import ChannelsLastHook
from csg_seg.mm.model import build_model
from csg_seg.running.configs import read_config
from experiments.runs.runner import train_and_test

CIFAR10 = ROOT / 'configs' / 'cifar10'
NAME = 'resnet20_b64-20e_cifar10-npz'
DENSE, CSG = CIFAR10 / f'{NAME}.py', CIFAR10 / f'csg-s12-d72_{NAME}.py'
IMAGENET = ROOT / 'configs' / 'imagenet' / 'csg-s16-d128_resnet18_2xb16-2e_in1k-sample.py'
EPOCHS = 4


@pytest.fixture(scope='module')
def npz(request, tmp_path_factory):
    """The real subset of CIFAR-10, or stripes whose direction tells the class where there is none."""
    if request.config.getoption('--data-root'):
        return request.getfixturevalue('real_data')
    folder = tmp_path_factory.mktemp('npz')
    rng = np.random.default_rng(0)
    rows, columns = np.mgrid[:32, :32]
    made = {}
    for split, size in (('train', 512), ('test', 200)):
        labels = rng.integers(0, 10, size)
        angles = labels[:, None, None] * np.pi / 10
        waves = np.sin(rows * np.cos(angles) + columns * np.sin(angles) + rng.uniform(0, 6, (size, 1, 1)))
        made[f'x_{split}'] = np.repeat((127 + 100 * waves).astype(np.uint8)[..., None], 3, axis=3)
        made[f'y_{split}'] = labels
    np.savez(folder / 'cifar10-subset.npz', **made)
    return folder


def options(root, **more):
    small = {f'{split}_dataloader.dataset.data_root': root for split in ('train', 'val', 'test')}
    small |= {
        'train_dataloader.dataset.indices': 512,
        'test_dataloader.dataset.indices': 200,
        'val_dataloader.dataset.indices': 200,
        'train_cfg.max_epochs': EPOCHS,
        'train_cfg.val_interval': EPOCHS,
        'param_scheduler.1.T_max': EPOCHS - 2,
        'param_scheduler.1.end': EPOCHS,
        'default_hooks.checkpoint.max_keep_ckpts': EPOCHS,
        'default_hooks.logger.interval': 1,
    }
    return cfg_options(small | more)


@pytest.fixture(scope='module')
def trained(npz, tmp_path_factory):
    work_dir = tmp_path_factory.mktemp('trained')
    printed = run_tool('train.py', CSG, '--work-dir', work_dir, *options(npz, **{'randomness.seed': 0})).stdout
    return work_dir, printed


def test_training_lowers_the_loss(trained):
    losses = [float(loss) for loss in re.findall(r'Epoch\(train\).* loss: ([\d.]+)', trained[1])]
    assert len(losses) == 8 * EPOCHS
    assert max(losses[-4:]) < min(losses[:4])


@pytest.mark.parametrize('suffix', ['.pth', '.safetensors'])
def test_the_test_tool_gives_accuracy_of_all_and_of_each_class(suffix, trained, npz, tmp_path):
    checkpoint = trained[0] / f'epoch_{EPOCHS}{suffix}'
    done = run_tool('test.py', CSG, checkpoint, '--json', '--work-dir', tmp_path, *options(npz))
    scores = json.loads(done.stdout)
    validated = float(re.findall(r'Epoch\(val\).*accuracy/top1: ([\d.]+)', trained[1])[-1])
    assert scores['accuracy/top1'] == pytest.approx(validated, abs=1e-3)
    of_classes = [value for key, value in scores.items() if key.startswith('accuracy_of/')]
    assert len(of_classes) == 10
    assert min(of_classes) <= scores['accuracy/top1'] <= max(of_classes)
    assert 'airplane' in done.stderr
    assert len(list(tmp_path.glob('*/confusion_matrix.png'))) == 1


def test_a_resumed_training_ends_with_the_same_weights(trained, npz, tmp_path):
    half = tmp_path / f'epoch_{EPOCHS // 2}.pth'
    shutil.copy(trained[0] / half.name, half)
    (tmp_path / 'last_checkpoint').write_text(str(half))
    run_tool('train.py', CSG, '--resume', '--work-dir', tmp_path, *options(npz, **{'randomness.seed': 0}))
    ours, theirs = (read_checkpoint(each / f'epoch_{EPOCHS}.pth')['state_dict'] for each in (tmp_path, trained[0]))
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert torch.equal(ours[name], theirs[name]), name


def test_pictures_of_every_test_image(trained, npz, tmp_path):
    checkpoint = trained[0] / f'epoch_{EPOCHS}.pth'
    few = options(npz, **{'test_dataloader.dataset.indices': 6, 'test_dataloader.batch_size': 3})
    run_tool('test.py', CSG, checkpoint, '--work-dir', tmp_path, '--show-dir', tmp_path / 'shown', *few)
    assert len(list((tmp_path / 'shown').rglob('*.png'))) == 6


def test_channels_last_changes_the_format_and_not_the_result():
    cfg = Config.fromfile(CSG)
    model = build_model(cfg).eval()
    image = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model.backbone(image)[0]
        ChannelsLastHook().before_run(SimpleNamespace(model=model))
        found = model.backbone(image)[0]
    assert found.is_contiguous(memory_format=torch.channels_last)
    assert not expected.is_contiguous(memory_format=torch.channels_last)
    assert (found - expected).abs().max() < 1e-4 * expected.abs().max()


@pytest.mark.parametrize('fails', [False, True])
def test_a_terminal_shows_a_bar_and_is_itself_again(fails, trained, npz, tmp_path):
    checkpoint = 'absent.pth' if fails else trained[0] / f'epoch_{EPOCHS}.pth'
    test = [sys.executable, ROOT / 'tools' / 'test.py', CSG, checkpoint, '--work-dir', tmp_path, *options(npz)]
    command = shlex.join(map(str, test))
    printed = run_program('script', '-qec', command, '/dev/null', check=not fails).stdout
    assert printed.count('\x1b[?25l') == printed.count('\x1b[?25h')
    assert fails or ('100%' in printed and 'accuracy/top1' in printed)


@pytest.mark.full
def test_several_seeds_are_gathered_and_not_trained_twice(npz, tmp_path):
    settings = {'train_cfg.max_epochs': 1, 'param_scheduler.1.end': 3, 'train_dataloader.dataset.indices': 128}
    settings |= {'test_dataloader.dataset.indices': 100, 'val_dataloader.dataset.indices': 100}
    settings |= {f'{split}_dataloader.dataset.data_root': str(npz) for split in ('train', 'val', 'test')}

    def train(**changes):
        return train_and_test({'csg': read_config(CSG, {**settings, **changes})}, [0, 1], tmp_path, jobs=2)

    result = train()
    network = result['networks']['csg']
    assert network['stored_params'] == 115_426
    assert list(network['scores']) == [0, 1]
    assert network['mean'] == pytest.approx(sum(network['scores'].values()) / 2)
    assert {'device', 'torch', 'mmengine', 'python'} <= result['made_with'].keys()
    logs = {path: path.stat().st_mtime_ns for path in tmp_path.glob('*/*/train.txt')}
    assert len(logs) == 2
    assert train()['networks'] == result['networks']
    assert all(path.stat().st_mtime_ns == before for path, before in logs.items())
    with pytest.raises(CSGError, match='holds a run with other settings'):
        train(**{'model.csg.code_dim': 36})


def test_a_failed_run_is_named(tmp_path):
    cfg = read_config(CSG, {'train_dataloader.dataset.data_root': str(tmp_path)})
    with pytest.raises(CSGError, match=r'train\.py .* failed: .*cifar10-subset\.npz does not exist'):
        train_and_test({'csg': cfg}, [0], tmp_path)


@pytest.fixture
def imagenet(real_data):
    folder = real_data / 'imagenet-sample'
    assert (folder / 'train').is_dir(), f'{folder} is missing'
    small = {f'{split}_dataloader.dataset.data_root': folder for split in ('train', 'val', 'test')}
    small |= {f'{split}_dataloader.num_workers': 0 for split in ('train', 'val', 'test')}
    small |= {
        'train_dataloader.batch_size': 8,
        'train_dataloader.dataset.indices': 32,
        'train_dataloader.dataset.pipeline.1.scale': 64,
        'val_dataloader.dataset.indices': 16,
        'test_dataloader.dataset.indices': 16,
        'train_cfg.max_epochs': 1,
        'default_hooks.logger.interval': 1,
        'randomness.seed': 0,
    }
    for split in ('val', 'test'):
        small |= {
            f'{split}_dataloader.dataset.pipeline.1.scale': 72,
            f'{split}_dataloader.dataset.pipeline.2.crop_size': 64,
        }
    return small


def test_imagenet_is_trained_resumed_and_tested(imagenet, tmp_path):
    run_tool('train.py', IMAGENET, '--work-dir', tmp_path, *cfg_options(imagenet))
    assert (tmp_path / 'epoch_1.safetensors').exists()
    longer = cfg_options(imagenet | {'train_cfg.max_epochs': 2})
    printed = run_tool('train.py', IMAGENET, '--resume', '--work-dir', tmp_path, *longer).stdout
    assert 'Epoch(train) [2][4/4]' in printed
    assert 'Epoch(train) [1]' not in printed
    done = run_tool('test.py', IMAGENET, tmp_path / 'epoch_2.pth', '--json', '--work-dir', tmp_path, *longer)
    assert {'accuracy/top1', 'accuracy/top5'} <= json.loads(done.stdout).keys()


@pytest.mark.full
def test_imagenet_on_two_processes(imagenet, tmp_path):
    shared = cfg_options(imagenet)
    environment = ('env', f'PYTHON={sys.executable}', 'PORT=29517')
    command = (*environment, 'tools/dist_train.sh', IMAGENET, 2, '--work-dir', tmp_path)
    printed = run_program(*command, *shared).stdout
    assert 'Epoch(train) [1][2/2]' in printed
    assert 'accuracy/top1' in printed
    run_program(*environment, 'tools/dist_test.sh', IMAGENET, tmp_path / 'epoch_1.pth', 2, *shared)
