"""Scores and sizes of a trained network on its way to the files that ship."""

import json

import pytest
import torch
from conftest import ROOT, cfg_options, run_experiment
from mmengine.config import Config

from csg_seg.mm.model import build_model

DENSE = ROOT / 'configs' / 'demo' / 'deeplabv3_r18-d8-w32_drawn-voc-64x64.py'


@pytest.mark.full
def test_every_stage_of_a_network_is_scored(drawn, tmp_path):
    torch.manual_seed(0)
    torch.save({'state_dict': build_model(Config.fromfile(DENSE)).state_dict()}, tmp_path / 'dense.pth')
    roots = {f'{split}_dataloader.dataset.data_root': drawn for split in ('train', 'val', 'test')}
    steps = {'train_cfg.max_iters': 2, 'train_dataloader.batch_size': 2, 'default_hooks.checkpoint.interval': 2}
    steps['optim_wrapper.optimizer.lr'] = 1e-6  # the start values are no trained network, and would diverge
    out = tmp_path / 'stages.json'
    options = ['--ratios', 3, 5, '--work-dir', tmp_path / 'runs', '--out', out, *cfg_options({**roots, **steps})]
    run_experiment('shipping', DENSE, tmp_path / 'dense.pth', *options)
    dense, fit3, fit5, trained, compact, plain, onnx = json.loads(out.read_text())['stages']
    assert dense['stored_params'] == plain['stored_params'] == onnx['stored_params']
    assert dense['stored_params'] >= 3 * fit3['stored_params'] and dense['stored_params'] >= 5 * fit5['stored_params']
    assert fit3['stored_params'] == trained['stored_params'] == compact['stored_params']
    assert compact['bytes'] < trained['bytes'] / 3 < plain['bytes'] / 3
    # Plain convs and onnxruntime compute what the trained network computes.
    assert trained['score'] == pytest.approx(plain['score'], abs=0.05)
    assert trained['score'] == pytest.approx(onnx['score'], abs=0.05)


def test_a_classifier_is_refused(refused, tmp_path):
    classifier = ROOT / 'configs' / 'cifar10' / 'resnet20_b64-3e_cifar10-npz.py'
    message = refused('experiments.shipping', classifier, tmp_path / 'x.pth', '--work-dir', tmp_path)
    assert 'has no decode_head' in message
