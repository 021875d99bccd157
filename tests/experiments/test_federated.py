"""Federated averaging: exchanged tensors are trained and averaged, all others stay as they were."""

import json
import time

import numpy as np
import pytest
import torch
from conftest import ROOT, run_experiment, run_tool
from mmengine.config import Config
from mmengine.registry import DATASETS, init_default_scope
from small_runs import CSG, DENSE, small_config, train

from csg_seg.errors import CSGError
from csg_seg.mm.checkpoints.reading import read_checkpoint
from csg_seg.mm.model import build_model
from csg_seg.running.configs import read_config
from experiments.federated.averaging import federate
from experiments.federated.picture import draw_federated

FROZEN = {'model.csg.freeze_generator': True}
SGD = {'optim_wrapper.optimizer.momentum': 0.0, 'optim_wrapper.optimizer.lr': 0.05}
SGD |= {'model.decode_head.dropout_ratio': 0, 'model.auxiliary_head.dropout_ratio': 0}


@pytest.fixture
def network(drawn, tmp_path):
    """Return a function that gives a config, and the checkpoint of its start values."""

    def make(path, **options) -> tuple[Config, str]:
        cfg = small_config(path, drawn, tmp_path, **options)
        start = tmp_path / f'start-{time.time_ns()}.pth'
        torch.manual_seed(0)
        torch.save({'meta': {}, 'state_dict': build_model(cfg).state_dict()}, start)
        return cfg, str(start)

    return make


def weights(path) -> dict[str, torch.Tensor]:
    state_dict = read_checkpoint(path)['state_dict']
    return {name: each for name, each in state_dict.items() if isinstance(each, torch.Tensor)}


def test_codes_alone_are_trained_and_exchanged(network, tmp_path):
    cfg, start = network(CSG)
    result = federate(cfg, start, '*.code', workers=2, rounds=2, steps=1, out=tmp_path / 'end.pth', test_every=2)
    before, after = weights(start), weights(tmp_path / 'end.pth')
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    codes = {name for name in before if name.endswith('.code')}
    assert moved == codes
    assert result['tensors'] == len(codes)
    assert result['bytes'] == 4 * sum(before[name].numel() for name in codes)
    assert [(each['round'], each['bytes']) for each in result['scores']] == [(0, 0), (2, 8 * result['bytes'])]


@pytest.mark.parametrize(('path', 'options'), [(DENSE, {}), (CSG, {}), (CSG, FROZEN)])
def test_all_that_is_trained_travels(network, tmp_path, path, options):
    cfg, start = network(path, **options)
    result = federate(cfg, start, workers=2, rounds=1, steps=1, out=tmp_path / 'end.pth')
    before, after = weights(start), weights(tmp_path / 'end.pth')
    floats = {name for name in before if before[name].is_floating_point()}
    stays = {'csg.0.weight'} if options else set()
    assert result['bytes'] == 4 * sum(before[name].numel() for name in floats - stays)
    assert {name for name in floats if torch.equal(before[name], after[name])} == stays


def test_rounds_of_one_worker_are_plain_training(network, tmp_path):
    cfg, start = network(CSG, **SGD)
    for rounds, steps in ((1, 4), (4, 1)):
        federate(cfg, start, workers=1, rounds=rounds, steps=steps, out=tmp_path / f'{rounds}.pth', test_every=4)
    once, often = weights(tmp_path / '1.pth'), weights(tmp_path / '4.pth')
    for name, tensor in once.items():
        torch.testing.assert_close(tensor, often[name], msg=lambda said, name=name: f'{name}: {said}')


def test_one_worker_trains_as_a_runner_does(network, tmp_path):
    cfg, start = network(CSG, **SGD, param_scheduler=[])
    federate(cfg, start, workers=1, rounds=1, steps=3, out=tmp_path / 'end.pth')
    cfg.load_from = start
    train(cfg)
    alone = weights(tmp_path / 'iter_3.pth')
    for name, tensor in weights(tmp_path / 'end.pth').items():
        torch.testing.assert_close(tensor, alone[name], msg=lambda said, name=name: f'{name}: {said}')


def test_parts_are_gone_through_again_and_again_by_epochs_too(tmp_path):
    path = ROOT / 'configs' / 'cifar10' / 'csg-s12-d72_resnet20_b64-20e_cifar10-npz.py'
    rng = np.random.default_rng(0)
    images = {f'x_{split}': rng.integers(0, 255, (8, 32, 32, 3), dtype=np.uint8) for split in ('train', 'test')}
    np.savez(tmp_path / 'cifar10-subset.npz', **images, **{f'y_{split}': np.arange(8) for split in ('train', 'test')})
    loaders = {f'{split}_dataloader.dataset.data_root': str(tmp_path) for split in ('train', 'val', 'test')}
    small = {'train_dataloader.batch_size': 2, 'work_dir': str(tmp_path), 'experiment_name': f'{time.time_ns()}'}
    cfg = read_config(path, {**loaders, **small})
    torch.save({'state_dict': build_model(cfg).state_dict()}, tmp_path / 'start.pth')
    options = dict(workers=2, rounds=1, steps=5, out=tmp_path / 'end.pth', metric='accuracy/top1')
    result = federate(cfg, tmp_path / 'start.pth', '*.code', **options)
    assert len(result['scores']) == 2


def test_the_mean_is_that_of_workers_on_disjoint_parts(network, tmp_path):
    cfg, start = network(CSG, **SGD)
    count = len(build_part(cfg))
    federate(cfg, start, '*.code', workers=2, rounds=1, steps=1, out=tmp_path / 'both.pth')
    for part, indices in enumerate((list(range(count // 2)), list(range(count // 2, count)))):
        cfg.train_dataloader.dataset.indices = indices
        federate(cfg, start, '*.code', workers=1, rounds=1, steps=1, out=tmp_path / f'{part}.pth')
    one, other, both = (weights(tmp_path / f'{name}.pth') for name in ('0', '1', 'both'))
    for name, tensor in both.items():
        if name.endswith('.code'):
            assert not torch.equal(one[name], other[name])
            torch.testing.assert_close(tensor, (one[name] + other[name]) / 2)


def build_part(cfg: Config):
    init_default_scope('mmseg')
    return DATASETS.build(cfg.train_dataloader.dataset)


@pytest.mark.parametrize(
    ('travels', 'change', 'said'),
    [
        ('*.kode', {}, r"'\*.kode' matches nothing that is trained; trained are"),
        ('csg.0.weight', {}, "'csg.0.weight' matches nothing that is trained"),
        ('*', {'workers': 1000}, 'training images are too few for 1000 workers'),
        ('*', {'rounds': 0}, 'rounds=0'),
        ('*', {'metric': 'IoU'}, "there is no metric 'IoU'; the test gave"),
    ],
)
def test_mistakes_are_named(network, tmp_path, travels, change, said):
    cfg, start = network(CSG, **FROZEN)
    arguments = {'workers': 2, 'rounds': 1, 'steps': 1, **change}
    with pytest.raises(CSGError, match=said):
        federate(cfg, start, travels, out=tmp_path / 'end.pth', **arguments)
    assert not (tmp_path / 'end.pth').exists()


def test_tool_compares_networks_and_draws(network, drawn, tmp_path):
    cfg, start = network(CSG)
    config = tmp_path / 'csg.py'
    cfg.dump(config)
    numbers = ['--workers', 2, '--rounds', 1, '--steps', 1, '--work-dir', tmp_path / 'runs']
    networks = ['--network', 'all', config, start, '*', '--network', 'codes', config, start, '*.code']
    outputs = ['--out', tmp_path / 'result.json', '--picture', tmp_path / 'curves.png', '--json']
    done = run_experiment('federated', *networks, *numbers, *outputs)
    result = json.loads(done.stdout)
    assert result == json.loads((tmp_path / 'result.json').read_text())
    assert set(result['networks']) == {'all', 'codes'}
    assert result['networks']['codes']['bytes'] < result['networks']['all']['bytes']
    assert (tmp_path / 'curves.png').stat().st_size > 10_000
    run_tool('test.py', config, tmp_path / 'runs' / 'codes.pth', '--work-dir', tmp_path / 'test')
    again = run_experiment('federated', *networks, *numbers, *outputs, check=False)
    assert again.returncode == 1 and '--overwrite' in again.stderr
    twice = run_experiment('federated', *networks[:5], *networks[:5], *numbers, '--overwrite', check=False)
    assert 'give each network its own name' in twice.stderr


def test_picture_with_another_ending_is_refused(tmp_path):
    point = {'round': 1, 'bytes': 10, 'score': 1.0}
    with pytest.raises(CSGError, match='use a name that ends in .png'):
        draw_federated({'one': {'scores': [point, point]}}, tmp_path / 'curves.xyz', metric='mIoU')
