"""Networks of equal size, measured side by side."""

import json

import pytest
from conftest import run_experiment

from csg_seg.errors import CSGError
from experiments.peers.measure import count_flops, held_in_step, measure_peers
from experiments.runs.table import read_table
from experiments.speed.timing import Load

LOAD = Load(batch_size=2, size=(32, 32), rounds=1, warm_up=1)
TABLE = """
dataset: drawn
metric: accuracy/top1
defaults: {network: resnet20, size: 32x32, config: configs/cifar10/resnet20_b64-20e_cifar10-npz.py}
cells:
  - {name: dense, method: dense}
  - {name: csg, method: csg, csg: {slice_shape: [12, 12, 3, 3], code_dim: 72}}
  - {name: narrow, method: narrow, options: {model.backbone.base_channels: 8, model.head.in_channels: 32}}
"""


@pytest.fixture
def table(tmp_path):
    path = tmp_path / 'table.yml'
    path.write_text(TABLE)
    return path


def test_networks_are_compared_with_the_dense_one(table):
    cells = read_table(table).cells
    networks = measure_peers(cells, LOAD)
    dense, csg, narrow = (networks[name] for name in ('dense', 'csg', 'narrow'))
    assert dense['step_ratio'] == dense['evaluation_ratio'] == 1
    # CSG stores less and computes as much; a narrow network computes less too.
    assert csg['stored_params'] == 115_426 < dense['stored_params'] == 269_722
    assert csg['flops'] == dense['flops'] > narrow['flops'] > 0
    assert held_in_step(narrow) < held_in_step(csg)
    for each in networks.values():
        assert 4 * each['stored_params'] < each['file_bytes'] < 4 * each['stored_params'] + 100_000
        assert 0 < each['load'] < each['first_image']
    with pytest.raises(CSGError, match='first cell must be of method dense'):
        measure_peers(cells[1:], LOAD)


def test_operations_are_those_of_the_convs_and_the_classifier(table):
    from csg_seg.mm.model import build_model

    dense, csg, _ = (build_model(cell.read_config()) for cell in read_table(table).cells)
    # 40.55 M multiply-adds, He et al., CVPR 2016, without shortcuts' convs.
    assert count_flops(dense, LOAD) == count_flops(csg, LOAD) == pytest.approx(2 * 40.55e6, rel=0.01)


def test_the_tool_measures_the_cells_it_is_told(table, tmp_path):
    out = tmp_path / 'peers.json'
    args = ['--only', 'csg', '--batch-size', '2', '--size', '32', '32', '--rounds', '1', '--warm-up', '1']
    done = run_experiment('peers', table, *args, '--out', out, '--json')
    result = json.loads(done.stdout)
    assert list(result['networks']) == ['dense', 'csg'] and json.loads(out.read_text()) == result
