"""Ways from a trained dense network to a generated one, compared by the tool."""

import json

import numpy as np
import pytest
import torch
from conftest import ROOT, run_tool
from mmengine.config import Config

from csg_seg.errors import CSGError
from csg_seg.mm.carry_over import carry_over
from csg_seg.mm.model import build_model

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


def test_the_tool_gathers_the_score_of_each_way(dense, tmp_path):
    out = tmp_path / 'ways.json'
    options = ['--ratios', 3, '--ways', 'features', '--work-dir', tmp_path / 'runs', '--out', out]
    printed = run_tool('carry_over.py', *dense, *options, '--json').stdout
    result = json.loads(out.read_text())
    assert json.loads(printed) == result
    found = result['ratios']['3']
    (way,) = found['networks'].values()
    assert way['compression_ratio'] >= 3 and 0 <= way['mean'] <= 100
    assert 0 <= found['fitted']['score'] <= 100 and found['made_with']['torch'] == torch.__version__
    assert result['dense']['stored_params'] == way['dense_params']


@pytest.mark.parametrize(
    ('way', 'says'),
    [('guess', "'guess' is not possible here"), ('features+channels', 'is not possible'), ('proximal', 'not possible')],
)
def test_a_way_that_the_config_does_not_allow_is_refused(way, says, dense, tmp_path):
    config, checkpoint = dense
    with pytest.raises(CSGError, match=says):
        carry_over(
            Config.fromfile(config), str(checkpoint), [3], [way], tmp_path, layers=[], tools=ROOT / 'tools', jobs=1
        )
    assert not list(tmp_path.iterdir())
