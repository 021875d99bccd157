"""The comparison of generators at equal size."""

import json
import sys

import pytest
import torch
from mmengine.config import Config

from csg_seg import summarise
from csg_seg.generators.registry import KINDS
from csg_seg.mm.model import build_model
from experiments.markdown import read
from experiments.rivals import __main__ as rivals
from experiments.rivals.compared import GENERATORS, config_name, config_paths


def test_every_generator_has_a_config_and_a_result():
    assert [path.stem for path in config_paths()] == [config_name(name) for name in GENERATORS]
    assert {*read('generators-resnet20')['networks']} == {path.stem for path in config_paths()}


@pytest.mark.parametrize('path', config_paths(), ids=lambda path: path.stem)
def test_results_are_of_networks_of_the_same_size(path):
    cfg = Config.fromfile(path)
    cfg.model.pop('teacher')
    cfg.model.type = 'CSGModel'
    with torch.device('meta'):
        stored = summarise(build_model(cfg)).stored_params
    assert stored == read('generators-resnet20')['networks'][path.stem]['stored_params']


def test_the_command_trains_all_generators_with_the_options_of_runs(tmp_path, monkeypatch, capsys):
    def train_and_test(configs, seeds, work_dir, **options):
        assert 'tensor_ring' in KINDS
        checkpoints = {each.model.teacher.checkpoint for each in configs.values()}
        found.update(seeds=seeds, work_dir=work_dir, checkpoints=checkpoints)
        score = dict(stored_params=1, compression_ratio=1.0, mean=90.0, std=None)
        return {'metric': 'accuracy/top1', 'networks': dict.fromkeys(configs, score)}

    found = {}
    monkeypatch.setattr(rivals, 'train_and_test', train_and_test)
    options = ['--cfg-options', 'model.teacher.checkpoint=dense.pth', '--out', str(tmp_path / 'out.json')]
    monkeypatch.setattr(sys, 'argv', ['rivals', '--work-dir', 'runs', *options, '--json'])
    rivals.main()
    assert found == {'seeds': [0], 'work_dir': 'runs', 'checkpoints': {'dense.pth'}}
    result = json.loads(capsys.readouterr().out)
    assert [*result['networks']] == [path.stem for path in config_paths()]
    assert json.loads((tmp_path / 'out.json').read_text()) == result
