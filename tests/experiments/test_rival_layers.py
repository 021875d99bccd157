"""Low-rank, separable and pruned networks, the rivals that change layers."""

from importlib import import_module
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, SMALL_MODEL
from torch import nn
from torch.nn import functional as F

from csg_seg.errors import CSGError
from csg_seg.layers.conv import kaiming_std
from csg_seg.mm.checkpoints.reading import load_weights, read_checkpoint
from csg_seg.mm.model import build_model
from csg_seg.running.configs import read_config
from experiments.rivals.separable import SeparableConv
from experiments.runs.table import read_table

TABLE = ROOT / 'experiments/rivals/tables/camvid_layers.yml'
CONFIG = ROOT / 'configs/deeplabv3/deeplabv3_r18-d16_1xb8-80e_camvid-180x240.py'
SIZES = {'10x': 1_371_702, '47x': 300_982}  # what csg-10x and csg-47x store
LIBRARIES = {'factorised': 'tltorch', 'pruned': 'torch_pruning', 'separable': 'torch'}
MODULES = {'tucker': 'factorised', 'cp': 'factorised', 'pruned': 'pruned', 'separable': 'separable'}
ODD_CONVS = [
    dict(kernel_size=3, padding=1),
    dict(kernel_size=3, stride=2, padding=2, dilation=2, bias=False),
    dict(kernel_size=1, stride=2),
]


def rival(name):
    pytest.importorskip(LIBRARIES[name], reason=f'{LIBRARIES[name]} is not installed; it is in the extra rivals')
    return import_module(f'experiments.rivals.{name}')


def build(**options):
    torch.manual_seed(0)
    settings = {'model.base_type': 'EncoderDecoder', **{f'model.{key}': value for key, value in options.items()}}
    return build_model(read_config(CONFIG, {**SMALL_MODEL, **(settings if options else {})}))


def count(model):
    return sum(each.numel() for each in model.parameters())


@pytest.mark.parametrize('cell', read_table(TABLE).cells[1:], ids=lambda cell: cell.name)
def test_a_cell_is_as_large_as_its_csg_network(cell):
    rival(MODULES[cell.method])
    assert count(build_model(cell.read_config())) == pytest.approx(SIZES[cell.name.partition('-')[2]], rel=0.03)


@pytest.mark.parametrize('implementation', ['reconstructed', 'factorized'])
@pytest.mark.parametrize(('method', 'rank'), [('tucker', (7, 5, 3, 3)), ('cp', 11)])
@pytest.mark.parametrize('options', ODD_CONVS)
def test_a_low_rank_conv_computes_the_conv_of_its_weight(method, rank, implementation, options):
    torch.manual_seed(0)
    conv = nn.Conv2d(13, 17, **options).double()
    kernel = conv.kernel_size
    rank = (*rank[:2], *kernel) if method == 'tucker' else rank
    low = rival('factorised').LowRankConv(conv, method=method, rank=rank, implementation=implementation).double()
    if low.bias is not None:
        nn.init.normal_(low.bias)
    images = torch.randn(2, 13, 12, 15, dtype=torch.double)
    wanted = F.conv2d(images, low.weight.to_tensor(), low.bias, conv.stride, conv.padding, conv.dilation)
    torch.testing.assert_close(low(images), wanted)


@pytest.mark.parametrize('method', ['tucker', 'cp'])
def test_low_rank_convs_start_at_kaiming_variance_and_learn_as_fast_as_dense_ones(method):
    factorised = rival('factorised')
    model = build(type='FactorisedModel', method=method, params=150_000, pointwise=0.5)
    model.init_weights()
    layers = {name: each for name, each in model.named_modules() if isinstance(each, factorised.LowRankConv)}
    dense = {name for name, each in model.named_modules() if type(each) is nn.Conv2d}
    assert dense == {'backbone.stem.0', 'decode_head.conv_seg', 'auxiliary_head.conv_seg'}
    assert len(layers) == 28
    for layer in layers.values():
        weight = layer.weight.to_tensor()
        fan_out = layer.out_channels * weight[0, 0].numel()
        assert weight.square().mean().item() == pytest.approx(2 / fan_out, rel=1e-4)
        if weight.shape[-1] == 3:
            assert 0.3 < moved(layer, torch.randn(weight.shape)) < 5


def moved(layer, gradient, step=1e-4):
    """How far a small gradient step moves the weight, relative to the step of a dense weight."""
    parts = list(layer.weight.parameters())
    before = layer.weight.to_tensor()
    slopes = torch.autograd.grad((before * gradient).sum(), parts)
    with torch.no_grad():
        for part, slope in zip(parts, slopes, strict=True):
            part.sub_(step * slope)
        return ((layer.weight.to_tensor() - before).norm() / (step * gradient.norm())).item()


@pytest.mark.parametrize('method', ['tucker', 'cp'])
@pytest.mark.parametrize('shape', [(17, 31, 3, 3), (64, 8, 1, 1)])
def test_a_decomposition_stores_as_many_parameters_as_counted(method, shape):
    factorised = rival('factorised')
    rank = factorised.RANK_RULES[method](shape, 0.3)
    conv = nn.Conv2d(shape[1], shape[0], shape[2:], bias=False)
    stored = count(factorised.LowRankConv(conv, method=method, rank=rank))
    assert stored == factorised.count_low_rank(shape, rank)
    assert stored == pytest.approx(0.3 * conv.weight.numel(), rel=0.15)


def test_low_rank_settings_that_cannot_be_met_are_refused():
    rival('factorised')
    with pytest.raises(CSGError, match="use 'tucker' or 'cp'"):
        build(type='FactorisedModel', method='tt', params=100_000)
    with pytest.raises(CSGError, match='raise params or lower pointwise'):
        build(type='FactorisedModel', method='cp', params=10_000)


def test_a_separable_conv_without_activation_computes_the_conv_of_its_product():
    torch.manual_seed(0)
    conv = nn.Conv2d(13, 17, 3, stride=2, padding=2, dilation=2)
    separable = SeparableConv(conv)
    separable.norm, separable.activate = nn.Identity(), nn.Identity()
    weight = separable.pointwise.weight * separable.depthwise.weight.transpose(0, 1)
    images = torch.randn(2, 13, 12, 15)
    wanted = F.conv2d(images, weight, separable.pointwise.bias, conv.stride, conv.padding, conv.dilation)
    torch.testing.assert_close(separable(images), wanted)


def test_all_3x3_convs_but_the_first_are_separable_and_start_at_kaiming_variance():
    model = build(type='SeparableModel')
    model.init_weights()
    convs = {name: each for name, each in model.named_modules() if isinstance(each, nn.Conv2d)}
    assert [name for name, conv in convs.items() if conv.kernel_size == (3, 3) and conv.groups == 1] == [
        'backbone.stem.0'
    ]
    for name, conv in convs.items():
        if name.endswith(('depthwise', 'pointwise')):
            assert conv.weight.std().item() == pytest.approx(kaiming_std(conv), rel=0.3)


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    """A dense network, and the file of its weights."""
    model = build()
    model.init_weights()
    path = tmp_path_factory.mktemp('dense') / 'dense.pth'
    torch.save({'state_dict': model.state_dict()}, path)
    return SimpleNamespace(model=model, path=path)


def pruned_model(dense):
    return build(type='PrunedModel', dense=str(dense), params=150_000)


def test_a_pruned_network_is_built_alike_each_time_and_loads_its_own_checkpoint(trained, tmp_path):
    rival('pruned')
    first, second, other = pruned_model(trained.path), pruned_model(trained.path), pruned_model('cell:dense')
    first.init_weights()
    torch.save(first.state_dict(), tmp_path / 'pruned.pth')
    torch.manual_seed(1)
    second.init_weights()
    torch.testing.assert_close(second.state_dict(), first.state_dict(), rtol=0, atol=0)
    load_weights(other, read_checkpoint(tmp_path / 'pruned.pth')['state_dict'])  # a test does not need the dense file
    torch.testing.assert_close(other.state_dict(), first.state_dict(), rtol=0, atol=0)


def test_pruning_keeps_filters_of_the_dense_network_and_all_classes(trained):
    rival('pruned')
    model = pruned_model(trained.path)
    model.init_weights()
    assert count(model) == pytest.approx(150_000, rel=0.03)
    assert model.decode_head.conv_seg.out_channels == model.auxiliary_head.conv_seg.out_channels == 11
    kept, dense = model.backbone.stem[0].weight, trained.model.backbone.stem[0].weight
    assert len(kept) < len(dense)
    assert all((each == dense).flatten(1).all(1).any() for each in kept)


def test_removing_channels_that_are_zero_leaves_the_outputs_unchanged(trained):
    pruned = rival('pruned')
    torch.manual_seed(0)
    model = nn.ModuleDict({'head': nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 5, 1))})
    model.head.fc = nn.Conv2d(5, 2, 1)
    model.extract_feat = lambda images: images
    with torch.no_grad():
        for tensor in (model.head[0].weight, model.head[0].bias):
            tensor[::2] = 0
        model.head[2].weight[:, ::2] = 0
        model.head[2].weight[:3] = model.head[2].bias[:3] = model.head.fc.weight[:, :3] = 0
    images = torch.randn(2, 3, 9, 11)
    before = model.head(images)
    pruned.prune(model, 0.5)
    assert [each.out_channels for each in model.modules() if isinstance(each, nn.Conv2d)] == [4, 2, 2]
    torch.testing.assert_close(model.head(images), before)


def test_a_training_without_the_dense_checkpoint_is_refused(trained, tmp_path):
    rival('pruned')
    with pytest.raises(FileNotFoundError, match='nowhere.pth: no such file'):
        pruned_model('nowhere.pth').init_weights()
    torch.save({'state_dict': {'weight': torch.zeros(3)}}, tmp_path / 'other.pth')
    with pytest.raises(CSGError, match='dense: .*other.pth: the checkpoint does not fit the config'):
        pruned_model(tmp_path / 'other.pth').init_weights()


def test_a_size_that_pruning_cannot_reach_is_refused():
    rival('pruned')
    with pytest.raises(CSGError, match='no pruning gives 9,000,000 parameters'):
        build(type='PrunedModel', dense='dense.pth', params=9_000_000)
