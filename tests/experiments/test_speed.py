"""Time and memory of a step, and the cost of large networks."""

import json
from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from conftest import ROOT, run_experiment

from csg_seg import summarise
from csg_seg.errors import CSGError
from csg_seg.layers.conv import CSGConv
from csg_seg.mm.model import build_model
from csg_seg.running.configs import read_config
from experiments.scale.__main__ import print_costs
from experiments.scale.picture import draw_scale
from experiments.speed.__main__ import print_tables
from experiments.speed.picture import draw_speed
from experiments.speed.timing import (
    PHASES,
    Clock,
    Load,
    Trainee,
    measure_speed,
    never_ahead,
    summarise_speed,
    training_load,
)

DENSE = ROOT / 'configs' / 'cifar10' / 'resnet20_b192-200e_cifar10.py'
CSG = DENSE.with_name(f'csg-s12-d72_{DENSE.name}')
SEGMENTOR = ROOT / 'configs' / 'deeplabv3' / 'csg-s16-d128_deeplabv3_r18-d8_1xb4-1k_camvid-144x192.py'


@pytest.fixture(scope='module')
def measured():
    load = Load(batch_size=3, size=(32, 32), rounds=2, warm_up=1)
    return load, measure_speed(read_config(CSG), load, without_ahead=True)


def test_every_network_takes_every_turn(measured):
    load, networks = measured
    assert list(networks) == ['dense', 'csg', 'materialised', 'csg, not ahead']
    for name, each in networks.items():
        phases = {'forward', 'backward', 'optimizer', 'evaluation'} | ({'generation'} if name == 'csg' else set())
        assert each['seconds'].keys() == phases
        assert all(len(seconds) == load.rounds and min(seconds) > 0 for seconds in each['seconds'].values())


def test_a_step_holds_what_is_stored_and_the_weights_it_generates(measured):
    _, networks = measured
    dense, csg, materialised = (networks[name]['bytes'] for name in ('dense', 'csg', 'materialised'))
    summary = summarise(build_model(read_config(CSG)))
    assert csg['parameter_bytes'] == csg['gradient_bytes'] == 4 * summary.trainable_params
    assert dense['parameter_bytes'] == 4 * summary.dense_params
    assert csg['activation_bytes'] > dense['activation_bytes']
    # Backward wants each generated weight once, and what it was cropped from.
    assert csg['activation_bytes'] - dense['activation_bytes'] < 4 * dense['parameter_bytes']
    assert materialised == dense


def test_the_floor_is_the_ratio_of_operations(measured):
    load, networks = measured
    networks = {**networks, 'csg, float32': networks['csg']}
    summary = summarise_speed(networks, load, slower_generation=2)
    assert summary['dense']['floor'] == summary['materialised']['floor'] == 1
    model = build_model(read_config(CSG))
    weights = sum(conv.code.shape[0] * conv.generator.weight.shape[1] for conv in model.csg.layers.values())
    made = 6 * model.csg[0].settings.code_dim * weights
    assert networks['csg']['operations'] - networks['dense']['operations'] == made
    for name, slower in (('csg', 1), ('csg, float32', 2)):
        assert summary[name]['floor'] == pytest.approx(1 + slower * made / networks['dense']['operations'])


def test_weights_are_generated_once_for_several_batches(measured):
    load = Load(batch_size=3, size=(32, 32), rounds=1, warm_up=1, accumulate=2)
    networks = measure_speed(read_config(CSG), load)
    operations = {name: each['operations'] for name, each in networks.items()}
    assert operations['dense'] == 2 * measured[1]['dense']['operations']
    added = {name: each - operations['dense'] for name, each in operations.items()}
    assert added['csg'] == 2 * added['csg, generated once'] > 0
    assert all(min(networks['csg, generated once']['seconds'][phase]) > 0 for phase in PHASES)


def test_without_ahead_each_layer_makes_its_weight_in_each_pass(monkeypatch):
    ahead = build_model(read_config(CSG)).eval()
    alone = never_ahead(deepcopy(ahead))
    made = []
    generate = CSGConv.generate_weight
    monkeypatch.setattr(CSGConv, 'generate_weight', lambda conv: made.append(conv) or generate(conv))
    images = torch.randn(1, 3, 32, 32)
    outputs = {}
    for name, model, times in (('ahead', ahead, 0), ('alone', alone, 2)):
        made.clear()
        with torch.no_grad():
            first, outputs[name] = (model(images, mode='tensor')[0] for _ in range(2))
        assert torch.equal(first, outputs[name])
        assert len(made) == times * len(model.csg.layers)
    torch.testing.assert_close(outputs['ahead'], outputs['alone'])


def test_generation_in_float32_is_measured_beside_autocasts_precision():
    load = Load(batch_size=3, size=(32, 32), rounds=1, warm_up=1, bf16=True)
    networks = measure_speed(read_config(CSG), load, float32_generation=True)
    assert list(networks) == ['dense', 'csg', 'materialised', 'csg, float32']
    held = {name: networks[name]['bytes']['activation_bytes'] for name in ('csg', 'csg, float32')}
    assert held['csg, float32'] != held['csg']
    with pytest.raises(CSGError, match='add --bf16'):
        measure_speed(read_config(CSG), replace(load, bf16=False), float32_generation=True)


def test_activations_grow_with_the_batch():
    cfg = read_config(CSG)
    one, two = (
        Trainee(build_model(cfg), cfg, Load(batch_size=size, size=(32, 32))).count_bytes()['activation_bytes']
        for size in (4, 8)
    )
    assert 1.7 * one < two < 2 * one


def test_medians_and_ratios_are_of_the_same_rounds():
    def network(forward, **more):
        seconds = {'forward': forward, 'backward': [1.0] * 3, 'optimizer': [0.0] * 3, 'evaluation': [2.0] * 3}
        held = dict.fromkeys(('parameter_bytes', 'gradient_bytes', 'optimizer_bytes', 'activation_bytes'), 10)
        return {'seconds': seconds | more, 'bytes': held, 'operations': 1}

    networks = {'dense': network([1.0, 3.0, 1.0]), 'csg': network([2.0, 5.0, 1.0], generation=[0.3] * 3)}
    summary = summarise_speed(networks, Load(batch_size=6, size=(8, 8)))
    assert summary['dense']['step'] == 2.0 and summary['dense']['step_ratio'] == 1.0
    assert summary['csg']['step'] == 3.0 and summary['csg']['step_ratio'] == 1.5
    assert summary['csg']['generation_share'] == pytest.approx(0.1)
    assert summary['csg']['images_per_second'] == 2.0
    assert summary['csg']['evaluation_ratio'] == summary['csg']['memory_ratio'] == 1.0


def test_time_is_that_between_moments():
    clock = Clock('cpu')
    for _ in range(3):
        clock.mark()
    first, second, third = clock.moments
    assert clock.spans() == [second - first, third - second]


def test_a_config_says_what_it_trains_with():
    assert training_load(read_config(SEGMENTOR)) == {'batch_size': 4, 'size': (144, 192)}
    assert training_load(read_config(CSG)) == {'batch_size': 192, 'size': (32, 32)}


@pytest.mark.parametrize(
    ('arguments', 'said'),
    [
        ([DENSE], 'the config is dense, so there is nothing to compare; give a CSG config'),
        ([CSG, '--batch-size', 1], 'batch_size 2, because of batch norm'),
        ([CSG, '--picture', 'seen.txt'], 'seen.txt'),
        ([CSG, '--picture', 'seen.png', '--out', './seen.png'], '--out and --picture are one file'),
        ([CSG, '--batch-size', 0], 'batch_size=0'),
        ([CSG, '--size', 200000, 200000], 'no step on 192 images of 200000x200000 pixels: '),
        pytest.param(
            [CSG, '--device', 'cuda'],
            'there is no GPU here; use device cpu',
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason='there is a GPU'),
        ),
    ],
)
def test_the_tool_ends_with_one_line_on_a_mistake(arguments, said):
    done = run_experiment('speed', *arguments, check=False)
    assert done.returncode == 1
    assert done.stderr.strip().splitlines()[-1].startswith('error: ') and said in done.stderr


def test_the_tool_measures_draws_and_prints(tmp_path, capsys):
    out, picture = tmp_path / 'speed.json', tmp_path / 'speed.png'
    arguments = [CSG, '--batch-size', 2, '--size', 32, 32, '--rounds', 1, '--warm-up', 1]
    done = run_experiment('speed', *arguments, '--out', out, '--picture', picture, '--json')
    result = json.loads(done.stdout)
    assert result == json.loads(out.read_text())
    assert result['load']['size'] == [32, 32]
    assert picture.read_bytes().startswith(b'\x89PNG')
    print_tables(result)
    printed = capsys.readouterr().out
    assert '1.000x' in printed and f'{result["summary"]["csg"]["generation_share"]:.1%}' in printed


def test_a_picture_shows_what_was_measured(measured, tmp_path):
    load, networks = measured
    draw_speed(networks, load, tmp_path / 'new' / 'speed.png', title='ResNet-20')
    with pytest.raises(CSGError, match='use a name that ends in .png'):
        draw_speed(networks, load, tmp_path / 'speed.nothing', title='ResNet-20')


@pytest.mark.full
def test_networks_of_all_sizes_are_taken_through_all_phases(tmp_path, capsys):
    out, picture = tmp_path / 'scale.json', tmp_path / 'scale.png'
    done = run_experiment('scale', DENSE, '--out', out, '--picture', picture, '--json')
    result = json.loads(done.stdout)
    assert result == json.loads(out.read_text())
    row = result['networks'][DENSE.stem]
    assert row['params'] == summarise(build_model(read_config(CSG))).dense_params
    assert row['stored_params'] < row['params'] and row['compact_bytes'] < row['dense_bytes']
    assert list(row['seconds']) == ['build', 'retrofit', 'fit', 'save', 'load']
    draw_scale({'one': row, 'two': {**row, 'params': 2 * row['params']}}, picture)
    print_costs(result)
    assert '0.27 M' in capsys.readouterr().out
    refused = run_experiment('scale', CSG, check=False)
    assert 'give the dense config; it is retrofitted here' in refused.stderr
