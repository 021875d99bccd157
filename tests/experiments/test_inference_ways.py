"""Memory and first image of the ways to run a network."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, run_experiment

from csg_seg.running.configs import read_config
from experiments.inference.__main__ import print_ways
from experiments.inference.ways import WAYS, measure_way, write_files

CSG = ROOT / 'configs' / 'unet' / 'csg-s16-d99_unet-s5-d16-w32_fcn_1xb8-80e_camvid-176x240.py'
SIZE = (32, 48)
SMALL = {
    'model.backbone.base_channels': 16,
    'model.decode_head.in_channels': 16,
    'model.auxiliary_head.in_channels': 32,
}


@pytest.fixture(scope='module')
def files(tmp_path_factory):
    cfg = read_config(CSG, SMALL)
    return cfg, *write_files(cfg, SIZE, tmp_path_factory.mktemp('files'))


SMALL = {
    'model.backbone.base_channels': 16,
    'model.decode_head.in_channels': 16,
    'model.auxiliary_head.in_channels': 32,
}


def test_every_way_computes_the_same_scores(files):
    cfg, _, paths = files
    image = torch.rand(1, 3, *SIZE, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        scores = {name: np.asarray(_first(way(cfg, paths)(image))) for name, way in WAYS.items()}
    for name, each in scores.items():
        # ONNX files have scores of the image's size.
        reference = scores['onnx' if name.startswith('onnx') else 'dense']
        np.testing.assert_allclose(each, reference, rtol=1e-3, atol=1e-4, err_msg=name)


def _first(outputs):
    return outputs[0] if isinstance(outputs, (tuple, list)) else outputs


@pytest.mark.parametrize('way', WAYS)
def test_time_and_memory_are_measured_from_the_start_of_loading(way, files):
    cfg, counts, paths = files
    found = measure_way(way, cfg.to_dict(), paths, SIZE, 1)
    assert 0 < found['load'] < found['first_image'] and found['next_image'] > 0
    assert found['peak_bytes'] >= 0
    assert counts['largest_bytes'] < counts['dense_bytes'] and counts['stored_bytes'] < counts['dense_bytes']


@pytest.mark.full
def test_the_command_measures_every_way(tmp_path):
    out = tmp_path / 'x.json'
    done = run_experiment('inference', CSG, '--size', *SIZE, '--rounds', 1, '--out', out, '--json')
    result = json.loads(out.read_text())
    assert json.loads(done.stdout) == result
    assert list(result['ways']) == list(WAYS)
    assert all(each['peak_bytes'] > 0 for each in result['ways'].values())


def test_the_table_has_a_line_for_each_way(capsys):
    each = dict.fromkeys(('file_bytes', 'load', 'first_image', 'next_image', 'peak_bytes'), 1.0)
    print_ways({'ways': dict.fromkeys(WAYS, each)})
    printed = capsys.readouterr().out
    assert all(name in printed for name in WAYS)


def test_wrong_arguments_are_refused(refused):
    dense = Path(str(CSG).replace('csg-s16-d99_', ''))
    assert 'the config is dense' in refused('experiments.inference', dense)
    assert 'must be at least 1' in refused('experiments.inference', CSG, '--rounds', 0)
