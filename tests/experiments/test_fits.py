"""Ways to fit a generator to trained weights, compared."""

import json
from copy import deepcopy

import numpy as np
import pytest
import torch
from conftest import ROOT, run_experiment
from mmengine.config import Config
from torch import nn

from csg_seg.errors import CSGError
from csg_seg.generators.settings import Settings
from csg_seg.layers.conv import generated_convs
from csg_seg.mm.checkpoints.reading import load_weights, read_checkpoint
from csg_seg.mm.model import build_model
from csg_seg.running.configs import read_config
from experiments.fits.measure import (
    check_ways,
    compare_fits,
    input_moments,
    output_error,
    read_layers,
    read_settings,
    renormalised,
    train_from_fits,
    weight_error,
    with_weights,
)
from experiments.fits.methods import FITS, Layer, fit_by, permuted

CIFAR10 = ROOT / 'configs' / 'cifar10'
NAME = 'resnet20_b64-20e_cifar10-npz'
OVERHANGING = Settings((12, 8, 3, 3), 20)


@pytest.fixture(scope='module')
def config(tmp_path_factory):
    """A ResNet-8 and a few images of noise."""
    folder = tmp_path_factory.mktemp('npz')
    rng = np.random.default_rng(0)
    images = {f'x_{split}': rng.integers(0, 256, (30, 32, 32, 3), dtype=np.uint8) for split in ('train', 'test')}
    labels = {f'y_{split}': rng.integers(0, 10, 30) for split in ('train', 'test')}
    np.savez(folder / 'cifar10-subset.npz', **images, **labels)
    cfg = read_config(CIFAR10 / f'{NAME}.py')
    cfg.merge_from_dict({'model.backbone.depth': 8})
    for split in ('train', 'val', 'test'):
        cfg[f'{split}_dataloader'].dataset.data_root = str(folder)
    return cfg


@pytest.fixture(scope='module')
def network(config):
    torch.manual_seed(0)
    model = build_model(config)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias)
    return renormalised(model, [torch.randn(16, 3, 32, 32)])


@pytest.fixture(scope='module')
def layers(network):
    names = [name for name, each in network.named_modules() if isinstance(each, nn.Conv2d)][1:]
    # Channels of very different size, as images and ReLU make them.
    images = torch.randn(8, 3, 32, 32) * torch.tensor([3.0, 1.0, 0.1]).view(3, 1, 1)
    return read_layers(network, names, input_moments(network, [images]))


@pytest.fixture(scope='module')
def checkpoint(network, tmp_path_factory):
    path = tmp_path_factory.mktemp('dense') / 'resnet8.pth'
    torch.save({'state_dict': network.state_dict()}, path)
    return path


@pytest.mark.parametrize('way', FITS)
def test_every_way_gives_each_layer_a_weight_of_its_shape(way, layers):
    fitted = fit_by(way, layers, OVERHANGING)
    assert {name: each.shape for name, each in fitted.items()} == {
        name: layer.weight.shape for name, layer in layers.items()
    }
    assert all(0 < weight_error(fitted[name], layer) < 1.5 for name, layer in layers.items())


@pytest.mark.parametrize('way', FITS)
def test_with_codes_as_long_as_slices_every_way_is_exact(way, layers):
    fitted = fit_by(way, layers, Settings((4, 5, 3, 3), 180))
    assert max(weight_error(fitted[name], layer) for name, layer in layers.items()) < 1e-5


def test_the_output_error_is_that_of_the_conv():
    torch.manual_seed(0)
    conv = nn.Conv2d(5, 7, 3, stride=2, padding=1, bias=False)
    other, images = torch.randn(7, 5, 3, 3), torch.randn(4, 5, 9, 11)

    class Tensors(nn.Sequential):
        def forward(self, x, mode):
            return super().forward(x)

    moments = input_moments(Tensors(conv), [images[:1], images[1:]])['0']
    found = output_error(other.double(), Layer(conv.weight.detach().double(), moments.double()))
    wanted = conv(images)
    left = wanted - nn.functional.conv2d(images, other, stride=2, padding=1)
    assert found == pytest.approx((left.norm() / wanted.norm()).item(), rel=1e-4)


def test_ways_that_see_inputs_spoil_outputs_less(layers):
    def mean_error(way):
        fitted = fit_by(way, layers, OVERHANGING)
        return sum(output_error(fitted[name], layer) ** 2 for name, layer in layers.items())

    blind, energies, moments = map(mean_error, ('free, layers at unit norm', 'input energies', 'input moments'))
    assert moments < energies < blind


def test_hidden_channels_may_come_in_any_order(network, layers):
    pairs = [name for name, layer in layers.items() if layer.reader]
    assert len(pairs) == 3
    orders = {name: torch.randperm(len(layers[name].weight)) for name in pairs}
    twin = with_weights(network, {name: each.weight for name, each in permuted(layers, orders).items()})
    for name, order in orders.items():
        norm = twin.get_submodule(name.replace('conv1', 'bn1'))
        for tensor in (norm.weight.data, norm.bias.data, norm.running_mean, norm.running_var):
            tensor.copy_(tensor[order])
    images = torch.randn(4, 3, 32, 32)
    assert not torch.equal(twin.get_submodule(pairs[0]).weight, network.get_submodule(pairs[0]).weight)
    assert torch.allclose(twin(images, mode='tensor')[0], network(images, mode='tensor')[0], atol=1e-5)


def test_a_dead_layer_is_named(network, layers):
    name = next(iter(layers))
    dead = with_weights(network, {name: torch.zeros_like(layers[name].weight)})
    with pytest.raises(CSGError, match=f'{name} is zero for all images'):
        read_layers(dead, [name], {name: layers[name].moments})


def test_settings_are_read_from_their_names(network):
    assert read_settings('s12-d72', network) == {'slice_shape': [12, 12, 3, 3], 'code_dim': 72}
    csg = read_settings('s8x4-3x', network)
    assert csg['slice_shape'] == [8, 4, 3, 3]
    dense = sum(each.numel() for each in network.parameters())
    generated = sum(each.weight.numel() for each in network.modules() if isinstance(each, nn.Conv2d)) - 16 * 27
    assert dense - generated + csg['code_dim'] * (288 + generated // 288) <= dense / 3
    assert dense - generated + (csg['code_dim'] + 1) * (288 + generated // 288) > dense / 3


@pytest.mark.full
def test_all_ways_are_compared(config, checkpoint):
    result = compare_fits(deepcopy(config), str(checkpoint), ['s8-d30'], images=20)
    assert list(result['settings']['s8-d30']['ways']) == list(FITS)
    ways = result['settings']['s8-d30']['ways'].values()
    assert all(0 <= each['accuracy'] <= 100 and each['weight_error'] > 0 for each in ways)
    json.dumps(result)


@pytest.mark.full
def test_a_training_starts_from_the_fit_itself(config, checkpoint, tmp_path):
    cfg = deepcopy(config)
    cfg.merge_from_dict({'train_cfg.max_epochs': 1, 'optim_wrapper.optimizer.lr': 0.0})
    way = 'input moments'
    result = compare_fits(cfg, str(checkpoint), ['s8-d30'], images=20, folder=tmp_path)
    train_from_fits(cfg, str(checkpoint), result, [way], tmp_path, layers=['backbone.layer*.*'])
    (run,) = tmp_path.glob('runs/*/seed0')
    trained = build_model(Config.fromfile(run.with_suffix('.py')))
    load_weights(trained, read_checkpoint((run / 'last_checkpoint').read_text())['state_dict'])
    fitted = read_checkpoint(tmp_path / 'fits' / f's8-d30 {way}.pth')['state_dict']
    for name, conv in generated_convs(trained):
        assert torch.allclose(conv.generate_weight(), fitted[f'{name}.weight'], atol=1e-5), name
    assert 0 <= result['settings']['s8-d30']['ways'][way]['accuracy_trained'] <= 100


@pytest.mark.full
def test_a_fit_that_no_generator_makes_is_not_trained(config, checkpoint, tmp_path):
    cfg = deepcopy(config)
    result = compare_fits(cfg, str(checkpoint), ['s8-d30'], images=20, folder=tmp_path)
    with pytest.raises(CSGError, match='no generator with these settings makes these weights .* leave it out'):
        train_from_fits(
            cfg, str(checkpoint), result, ['free, permuted channels'], tmp_path, layers=['backbone.layer*.*']
        )
    assert not (tmp_path / 'runs').exists()


def test_a_way_that_is_not_there_is_named():
    with pytest.raises(CSGError, match="no way 'guess'; choose from 'truncated SVD'"):
        check_ways(['guess'])


@pytest.mark.parametrize(
    ('change', 'says'),
    [
        ({'images': 0}, '--images 0: .*give at least 1'),
        ({'images': 31}, 'the train split has 30'),
        ({'texts': ['12-72']}, 'write settings as s12-d72'),
        ({'texts': ['s8-0.5x']}, 'must be above 1'),
        ({'texts': ['s8-900x']}, 'out of reach'),
    ],
)
def test_what_a_user_can_mistake_is_said(change, says, config, checkpoint):
    with pytest.raises(CSGError, match=says):
        compare_fits(deepcopy(config), str(checkpoint), **{'texts': ['s8-d30'], 'images': 20, **change})


def test_other_networks_are_refused(config, checkpoint):
    other = deepcopy(config)
    other.merge_from_dict({'model.backbone.depth': 14})
    with pytest.raises(CSGError, match='does not fit the config'):
        compare_fits(other, str(checkpoint), ['s8-d30'], images=20)


@pytest.mark.full
def test_the_tool_ends_in_one_line(checkpoint):
    done = run_experiment('fits', CIFAR10 / f'csg-s12-d72_{NAME}.py', checkpoint, check=False)
    assert done.returncode == 1
    assert done.stderr.strip().splitlines()[-1].startswith('error: a plan starts from a dense network')
