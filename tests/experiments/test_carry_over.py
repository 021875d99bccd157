"""Ways to train a generated network from a dense one."""

import json
import shutil

import numpy as np
import pytest
import torch
from conftest import ROOT, run_experiment
from mmengine.config import Config
from mmengine.optim import build_optim_wrapper

from csg_seg.errors import CSGError
from csg_seg.mm.model import build_model
from csg_seg.planning.planner import plan
from csg_seg.report import summarise
from experiments.carry_over.ways import PARAMWISE, WAYS, carry_over, possible_ways, proximal_start, way_config
from experiments.runs.runner import evaluate

SHORT = ROOT / 'configs' / 'cifar10' / 'resnet20_b64-3e_cifar10-npz.py'


@pytest.fixture(scope='module')
def dense(tmp_path_factory):
    """A small dense network on a few images: its config and its weights."""
    folder = tmp_path_factory.mktemp('dense')
    rng = np.random.default_rng(0)
    labels = np.arange(40) % 10
    images = rng.integers(0, 255, (40, 32, 32, 3), dtype=np.uint8)
    np.savez(folder / 'cifar10-subset.npz', x_train=images, y_train=labels, x_test=images, y_test=labels)
    config = folder / 'dense.py'
    loaders = ''.join(
        f'{split}_dataloader = dict(batch_size=4, dataset=dict(data_root={str(folder)!r}))\n'
        for split in ('train', 'val', 'test')
    )
    config.write_text(
        f'_base_ = {str(SHORT)!r}\nmodel = dict(backbone=dict(depth=8))\n'
        f'train_cfg = dict(max_epochs=1, val_interval=1)\nrandomness = dict(seed=0)\n{loaders}'
    )
    torch.manual_seed(0)
    torch.save({'state_dict': build_model(Config.fromfile(config)).state_dict()}, folder / 'dense.pth')
    return config, folder / 'dense.pth'


@pytest.mark.full
def test_the_tool_gathers_the_score_of_each_way(dense, tmp_path):
    out = tmp_path / 'ways.json'
    options = ['--ratios', 3, '--ways', 'features', '--work-dir', tmp_path / 'runs', '--out', out]
    printed = run_experiment('carry_over', *dense, *options, '--json').stdout
    result = json.loads(out.read_text())
    assert json.loads(printed) == result
    found = result['ratios']['3']
    (way,) = found['networks'].values()
    assert way['compression_ratio'] >= 3 and 0 <= way['mean'] <= 100
    assert 0 <= found['fitted']['score'] <= 100 and found['made_with']['torch'] == torch.__version__
    assert result['dense']['stored_params'] == way['dense_params']


@pytest.mark.parametrize(
    ('way', 'says'),
    [
        ('guess', "'guess' is not possible here"),
        ('features+labels+channels', 'is not possible'),
        ('proximal', 'not possible'),
    ],
)
def test_a_way_that_the_config_does_not_allow_is_refused(way, says, dense, tmp_path):
    config, checkpoint = dense
    with pytest.raises(CSGError, match=says):
        carry_over(Config.fromfile(config), str(checkpoint), [3], [way], tmp_path, layers=[])
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope='module')
def configs():
    """The dense config, a plan of its network, the config of each way, and of the proximal way's start."""
    cfg = Config.fromfile(SHORT)
    cfg.model.backbone.depth = 8
    planned = plan(build_model(cfg), ratio=3)
    ways = {
        way: way_config(way, cfg, 'dense.pth', planned, ['backbone.layer*.*'], 'near.pth') for way in possible_ways(cfg)
    }
    return cfg, planned, ways, proximal_start(cfg, 'dense.pth', planned, ['backbone.layer*.*'])


def test_all_ways_train_for_as_many_epochs(configs):
    cfg, _, ways, start = configs
    assert set(ways) == set(WAYS) - {'features+labels+channels'}
    for way, each in ways.items():
        epochs = each.train_cfg.max_epochs + (start.train_cfg.max_epochs if way == 'proximal' else 0)
        assert epochs == cfg.train_cfg.max_epochs == 3, way
        assert each.param_scheduler[-1].end == each.train_cfg.max_epochs, way
    assert start.param_scheduler[-1].end == start.train_cfg.max_epochs


def test_no_way_stores_more_than_the_plan(configs):
    _, planned, ways, _ = configs
    for way, each in ways.items():
        stored = summarise(build_model(untaught(each))).stored_params
        assert 0.8 < stored / planned.stored_params <= 1 if way == 'narrow' else stored == planned.stored_params, way


def untaught(cfg):
    """The same network without a teacher, whose weights are not there."""
    model = {key: value for key, value in cfg.model.items() if key not in ('teacher', 'init_cfg')}
    if model['type'] == 'TaughtModel':
        model['type'] = model.pop('base_type')
    return Config({**cfg.to_dict(), 'model': model})


def test_the_first_proximal_phase_imports_its_hook(configs):
    start = configs[-1]
    assert start.default_hooks.proximal.type == 'ProximalHook'
    assert {'csg_seg.mm', 'experiments.carry_over.proximal'} <= set(start.custom_imports.imports)


def test_each_way_starts_and_learns_as_its_name_says(configs):
    _, _, ways, _ = configs
    starts = {way: (each.model.get('init_cfg') or {}).get('checkpoint') for way, each in ways.items()}
    assert {way for way, start in starts.items() if start} == {'fine-tune', 'proximal'}
    assert (starts['fine-tune'], starts['proximal']) == ('dense.pth', 'near.pth')
    taught = {way for way, each in ways.items() if each.model.get('teacher')}
    assert taught == set(ways) - {'scratch', 'fine-tune'}
    compares = {way for way in taught if ways[way].model.teacher.get('features')}
    assert compares == {'features', 'features+labels', 'proximal', *PARAMWISE}
    assert {ways[way].model.teacher.checkpoint for way in taught} == {'dense.pth'}
    assert 'csg' not in ways['narrow'].model


def test_ways_with_rates_of_their_own_reach_codes_and_generators(configs):
    _, _, ways, _ = configs
    groups = {way: parameter_groups(ways[way]) for way in ('features', *PARAMWISE)}
    assert set(groups['features'].values()) == {(0.02, 5e-4)}
    for name in groups['features']:
        is_generator, is_code = name.startswith('csg.'), name.endswith('.code')
        decay = 0.0 if is_generator or is_code else 5e-4
        assert groups['features, no decay'][name] == (0.02, decay), name
        assert groups['features, fast generator'][name] == (pytest.approx(0.06 if is_generator else 0.02), 5e-4), name


def parameter_groups(cfg):
    """Learning rate and weight decay of each parameter."""
    model = build_model(untaught(cfg))
    groups = build_optim_wrapper(model, cfg.optim_wrapper).param_groups
    of = {id(parameter): (group['lr'], group['weight_decay']) for group in groups for parameter in group['params']}
    return {name: of[id(parameter)] for name, parameter in model.named_parameters()}


def test_other_weights_under_the_same_name_are_not_taken_for_these(dense, tmp_path):
    config, checkpoint = dense
    cfg, weights = Config.fromfile(config), tmp_path / 'dense.pth'
    shutil.copy(checkpoint, weights)
    first = evaluate(cfg, str(weights), tmp_path / 'run')
    assert evaluate(cfg, str(weights), tmp_path / 'run') == first
    torch.manual_seed(1)
    torch.save({'state_dict': build_model(cfg).state_dict()}, weights)
    with pytest.raises(CSGError, match='holds a run with other settings'):
        evaluate(cfg, str(weights), tmp_path / 'run')
