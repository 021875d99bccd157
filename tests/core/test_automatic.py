"""Settings by themselves: the ratio asked for, with the settings one would choose."""

import copy
import re
from fractions import Fraction

import numpy as np
import pytest
import torch
import torchvision
from torch import nn
from two_convs import Net, build

from csg_seg import CSGError, plan, retrofit, suggest, summarise
from csg_seg.layers.conv import generated_convs


def on_meta(function, **options):
    with torch.device('meta'):
        return function(**options)


NETWORKS = {
    'resnet18': torchvision.models.resnet18,
    'resnet50': torchvision.models.resnet50,
    'deeplabv3_resnet50': lambda: torchvision.models.segmentation.deeplabv3_resnet50(
        weights=None, weights_backbone=None
    ),
    'densenet121': torchvision.models.densenet121,
    'vgg11': lambda: torchvision.models.vgg11(num_classes=10).features,
    'r3d_18': torchvision.models.video.r3d_18,
    'mobilenet_v2': lambda: torchvision.models.mobilenet_v2().features,
}
RATIOS = {'resnet18': (2, 5, 10), 'resnet50': (2, 5), 'vgg11': (2, 10, 50), 'densenet121': (2, 3), 'mobilenet_v2': (2,)}


@pytest.mark.parametrize(
    ('name', 'ratio'), [(name, ratio) for name in NETWORKS for ratio in RATIOS.get(name, (2, 5, 10))]
)
def test_the_ratio_is_met_closely(name, ratio):
    model = on_meta(NETWORKS[name])
    settings = suggest(model, ratio)
    kernels = [each['slice_shape'][2:] for each in settings]
    assert len(set(kernels)) == len(kernels)
    found = summarise(retrofit(model, settings)).compression_ratio
    assert ratio <= found < 1.06 * ratio


def test_other_kernels_are_compressed_only_if_the_ratio_needs_it():
    model = on_meta(NETWORKS['deeplabv3_resnet50'])
    assert [each['slice_shape'][2:] for each in suggest(model, 1.8)] == [(3, 3)]
    assert {each['slice_shape'] for each in suggest(model, 20)} == {(16, 16, 3, 3), (16, 16, 1, 1)}


def test_small_networks_get_small_slices_and_classifiers_stay_dense():
    small = nn.Sequential(nn.Conv2d(3, 32, 3), nn.Conv2d(32, 64, 3), nn.Conv2d(64, 64, 3), nn.Conv2d(64, 5, 3))
    (settings,) = suggest(small, 3)
    assert settings['slice_shape'][0] < 16
    model = on_meta(NETWORKS['deeplabv3_resnet50'])
    model.classifier[4] = nn.Conv2d(256, 21, 1, device='meta')
    (by_kernel,) = [each for each in suggest(model, 20) if each['slice_shape'][2:] == (1, 1)]
    assert 'classifier.4' in by_kernel['exclude']


def test_settings_do_not_depend_on_weights_or_device():
    with torch.device('meta'):
        expected = suggest(torchvision.models.resnet18())
    assert suggest(torchvision.models.resnet18()) == expected


@pytest.mark.parametrize('ratio', [5, 5.0, None])
def test_retrofit_takes_a_ratio(ratio):
    model, twin = (torchvision.models.resnet18() for _ in range(2))
    retrofit(model, 'auto' if ratio is None else {'ratio': ratio})
    retrofit(twin, suggest(twin, ratio))
    assert model.csg[0].settings == twin.csg[0].settings
    assert summarise(model).compression_ratio == pytest.approx(ratio or 4, rel=0.03)


@pytest.mark.parametrize('name', NETWORKS)
def test_every_network_gets_settings_without_a_ratio(name):
    found = summarise(retrofit(on_meta(NETWORKS[name]), 'auto')).compression_ratio
    assert 1.2 < found < 4.2


def test_other_keys_go_to_every_generator():
    model = torchvision.models.resnet50()
    retrofit(model, {'ratio': 3, 'exclude': 'layer1', 'precision': 'autocast', 'seed': 5})
    assert len(model.csg) > 1
    assert [each.settings.seed for each in model.csg] == [
        5 * len(model.csg) + position for position in range(len(model.csg))
    ]
    assert all(each.settings.precision == 'autocast' for each in model.csg)
    assert not any(name.startswith('layer1') for name in model.csg.layers)
    assert summarise(model).compression_ratio >= 3


@pytest.mark.parametrize(
    ('csg', 'says'),
    [
        ({'ratio': 1}, 'ratio must be a number above 1; got 1'),
        ({'ratio': None}, "ratio is None; give a number above 1, or csg='auto'"),
        ({'ratio': 'ten'}, "ratio must be a number above 1; got 'ten'"),
        ({'ratio': True}, 'ratio must be a number above 1'),
        ({'ratio': 5, 'code_dim': 3}, "'code_dim' does not go with 'ratio'"),
        (
            {'ratio': 10**6},
            'out of reach; give at most 3.69, .* in convs that can be generated; left dense: the',
        ),
        ({'ratio': 2, 'seed': 'x'}, "seed must be an integer from 0; got 'x'"),
        ({'ratio': 2, 'include': 'nope'}, "include pattern 'nope' names no conv of the model"),
        ({'ratio': 2, 'exclude': 'decode_hed'}, "exclude pattern 'decode_hed' names no conv of the model; names look"),
        ([{'ratio': 2}], 'stand alone, not in a list'),
        (['auto'], 'stand alone, not in a list'),
        ('automatic', "csg must be a dict with slice_shape and code_dim.*or 'auto'; got 'automatic'"),
        ([], 'csg must be a dict'),
    ],
)
def test_mistakes_are_refused_and_the_network_stays(csg, says):
    model = Net()
    with pytest.raises(CSGError, match=says):
        retrofit(model, csg)
    assert type(model) is Net


def test_a_small_part_is_compressed_a_little():
    model = torchvision.models.segmentation.deeplabv3_resnet50(weights=None, weights_backbone=None)
    with pytest.raises(CSGError, match=r'a ratio of 4 is out of reach; give at most 1\.01, which'):
        retrofit(model, {'ratio': 4, 'include': ['classifier.1']})
    retrofit(model, {'ratio': 1.01, 'include': ['classifier.1']})
    assert summarise(model).compression_ratio >= 1.01


def test_include_and_exclude_choose_kernels():
    for options in ({'include': ['layer*.*.conv2']}, {'exclude': ['*.conv1', '*.conv3', '*.downsample.*']}):
        model = retrofit(on_meta(NETWORKS['resnet50']), {'ratio': 1.3, **options})
        assert all(name.endswith('conv2') for name in model.csg.layers)
        assert summarise(model).compression_ratio == pytest.approx(1.3, rel=0.05)


def test_a_conv_that_cannot_be_generated_may_be_excluded_and_the_first_be_included():
    model = torchvision.models.resnet18(weights=None)
    model.deformable = torchvision.ops.DeformConv2d(8, 8, 3)
    retrofit(model, {'ratio': 3, 'exclude': 'deformable'})
    assert summarise(model).compression_ratio == pytest.approx(3, rel=0.05)
    wide = nn.Sequential(nn.Conv2d(64, 64, 3), nn.Conv2d(64, 64, 3))
    assert [*retrofit(wide, {'ratio': 1.5, 'include': ['0']}).csg.layers] == ['0']


def test_names_with_brackets_are_names():
    net = nn.Sequential()
    for index, width in enumerate((3, 64, 64, 64)):
        net.add_module(f'conv[{index}]', nn.Conv2d(width, 64, 3))
    net.add_module('class[x]', nn.Conv2d(64, 1, 1))
    net.add_module('classx', nn.Conv2d(64, 64, 1))
    model = retrofit(copy.deepcopy(net), {'ratio': 10})
    assert [name for name, _ in generated_convs(model)] == ['conv[1]', 'conv[2]', 'conv[3]', 'classx']
    model = retrofit(copy.deepcopy(net), {'ratio': 1.3, 'include': ['conv[0]', 'conv[2]']})
    assert [name for name, _ in generated_convs(model)] == ['conv[0]', 'conv[2]']
    nested = nn.Sequential(nn.Conv2d(3, 3, 1), nn.Module())
    nested[1].add_module('part[1]', copy.deepcopy(net))
    model = retrofit(nested, {'ratio': 1.3, 'include': ['1.part[1]'], 'exclude': ['1.part[1].conv[3]', '*.class*']})
    assert [name for name, _ in generated_convs(model)] == [f'1.part[1].conv[{index}]' for index in range(3)]


def test_networks_with_nothing_to_compress_are_refused():
    with pytest.raises(CSGError, match='no conv to generate; those that stay dense: none'):
        retrofit(nn.Sequential(nn.Linear(8, 8)), 'auto')
    for layers in ([nn.Conv2d(3, 64, 3), nn.Conv2d(64, 64, 3, groups=64)], [nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3)]):
        with pytest.raises(CSGError, match='no conv to generate|would not make this network smaller'):
            retrofit(nn.Sequential(*layers), 'auto')
    with pytest.raises(CSGError, match='already retrofitted'):
        retrofit(build(), 'auto')


def test_the_ratio_that_a_message_offers_is_taken():
    layers = [nn.Conv2d(3, 64, 3), nn.Conv2d(64, 4, 3), nn.Conv2d(4, 16, 7), nn.Conv2d(16, 128, 3)]
    model = nn.Sequential(*layers)
    with pytest.raises(CSGError, match=r'give at most \d+\.\d') as caught:
        suggest(model, 100)
    offered = float(re.search(r'give at most (\d+\.\d)', str(caught.value))[1])
    assert summarise(retrofit(model, dict(ratio=offered))).compression_ratio >= offered


def test_other_keys_and_plans_are_refused_with_the_right_remedy():
    with pytest.raises(CSGError, match="unknown key 'rato'; did you mean 'ratio'"):
        retrofit(torchvision.models.resnet18(), dict(ratio=4, rato=4))
    with pytest.raises(CSGError, match='already retrofitted; materialise it first'):
        suggest(retrofit(torchvision.models.resnet18(), dict(ratio=4)))
    model = nn.Sequential(*(nn.Conv2d(32, 32, 3) for _ in range(4)))
    with pytest.raises(CSGError, match=r'got a Plan; give its csg'):
        retrofit(model, plan(model, ratio=2))


@pytest.mark.parametrize('kind', [Fraction, np.float64, np.int64, int])
def test_any_number_is_a_ratio(kind):
    net = torchvision.models.resnet18()
    assert suggest(net, kind(4)) == suggest(net, 4.0)
    assert (
        plan(net, ratio=kind(4), slice_shapes=[(8, 8, 3, 3)]).csg
        == plan(net, ratio=4.0, slice_shapes=[(8, 8, 3, 3)]).csg
    )
