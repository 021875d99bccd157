"""Compact checkpoints that hold how to build their network."""

import json

import pytest
import torch
from torch import nn
from torchvision import models

import csg_seg
from csg_seg.errors import CSGError
from csg_seg.storage.builders import BUILDERS, build, decode_source, encode_source

CSG = dict(slice_shape=(16, 16, 3, 3), code_dim=32)


def saved(tmp_path, model, source, **options):
    csg_seg.retrofit(model, CSG)
    csg_seg.save_compact(model.eval(), tmp_path / 'x.safetensors', source=source, **options)
    return tmp_path / 'x.safetensors'


@pytest.mark.parametrize(
    ('name', 'arguments', 'size'),
    [
        ('resnet18', {'num_classes': 7}, 33),
        ('lraspp_mobilenet_v3_large', {'num_classes': 5}, 65),
        ('fcn_resnet50', {'num_classes': 5}, 33),
    ],
)
def test_a_torchvision_network_needs_only_its_file(tmp_path, name, arguments, size):
    source = dict(builder='torchvision', name=name, **arguments)
    model = build(source)
    csg = CSG if name != 'lraspp_mobilenet_v3_large' else dict(slice_shape=(16, 16, 1, 1), code_dim=32)
    csg_seg.retrofit(model, csg).eval()
    csg_seg.save_compact(model, tmp_path / 'x.safetensors', source=source)
    loaded = csg_seg.load_compact(tmp_path / 'x.safetensors').eval()
    x = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    first, second = (out if isinstance(out, torch.Tensor) else out['out'] for out in (model(x), loaded(x)))
    assert torch.equal(first, second)


def test_a_timm_network_needs_only_its_file(tmp_path):
    timm = pytest.importorskip('timm')
    path = saved(
        tmp_path, timm.create_model('resnet18', num_classes=7), dict(builder='timm', name='resnet18', num_classes=7)
    )
    x = torch.randn(2, 3, 33, 33, generator=torch.Generator().manual_seed(0))
    loaded = csg_seg.load_compact(path).eval()
    assert isinstance(loaded, timm.models.resnet.ResNet) and loaded(x).shape == (2, 7)


def test_a_registered_builder_builds_the_network_of_a_file(tmp_path, monkeypatch):
    monkeypatch.setattr('csg_seg.storage.builders.BUILDERS', dict(BUILDERS))

    @csg_seg.register_builder('mine')
    def build_mine(*, width):
        return nn.Sequential(nn.Conv2d(3, width, 3), nn.Conv2d(width, width, 3))

    path = saved(tmp_path, build_mine(width=40), dict(builder='mine', width=40))
    assert csg_seg.load_compact(path)[1].code.shape == (9, 32)


def test_the_file_holds_source_versions_and_dtype(tmp_path):
    source = dict(builder='torchvision', name='resnet18')
    path = saved(tmp_path, models.resnet18(), source, dtype='int8')
    content = path.read_bytes()
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], 'little')])['__metadata__']
    assert json.loads(header['source']) == source
    assert json.loads(header['versions']) == {'csg_seg': csg_seg.__version__, 'torch': torch.__version__}
    assert (header['version'], header['dtype']) == ('3', 'int8')


@pytest.mark.parametrize('value', [(1, 2), [1, 2], [(1, (2,)), {'a': ()}], {'b': (0.5, 'c')}])
def test_tuples_come_back_as_tuples_and_lists_as_lists(value):
    assert repr(decode_source(encode_source({'builder': 'mine', 'value': value}))['value']) == repr(value)


def test_a_file_without_a_source_needs_the_model(tmp_path):
    path = saved(tmp_path, models.resnet18(), None)
    with pytest.raises(CSGError, match='does not say how its network is built; give load_compact the model'):
        csg_seg.load_compact(path)
    loaded = csg_seg.load_compact(path, models.resnet18())
    assert sum(each.numel() for each in loaded.parameters()) < sum(
        each.numel() for each in models.resnet18().parameters()
    )


@pytest.mark.parametrize(
    ('source', 'says'),
    [
        ('resnet18', "source must be a dict with 'builder'"),
        ({'name': 'resnet18'}, "source must be a dict with 'builder'"),
        ({'builder': 'mm'}, "no builder 'mm', only 'torchvision', 'timm'"),
        ({'builder': 'torchvision', 'name': 'resnet19'}, "'torchvision' cannot build the network"),
        ({'builder': 'torchvision', 'name': 'resnet18', 'weights': 'DEFAULT'}, 'weights is not for files'),
        ({'builder': 'torchvision', 'name': 'resnet18', 'width': 3}, "'torchvision' cannot build the network"),
        ({'builder': 'torchvision', 'name': 'resnet18', 'norm_layer': nn.BatchNorm2d}, 'plain values'),
        ({'builder': 'torchvision', 'name': 'resnet34'}, 'the source builds another network: its state dict'),
        ({'builder': 'torchvision', 'name': 'resnet18', 'num_classes': 7}, 'the source builds another network'),
        ({'builder': 'timm', 'name': 'hf-hub:someone/something'}, 'timm has no network'),
        ({'builder': 'timm', 'name': 'resnet18', 'checkpoint_path': 'x.pth'}, 'checkpoint_path is not for files'),
        ({'builder': 'timm', 'name': 'resnet18', 'pretrained': True}, 'pretrained is not for files'),
    ],
)
def test_unusable_sources_are_refused_when_saving(tmp_path, source, says):
    if isinstance(source, dict) and source.get('builder') == 'timm':
        pytest.importorskip('timm')
    with pytest.raises(CSGError, match=says):
        saved(tmp_path, models.resnet18(), source)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    'arguments', [{'num_classes': 10**9}, {'width_per_group': 10**5}, {'groups': 10**4}, {'num_classes': 10**15}]
)
def test_a_network_far_larger_than_the_file_is_never_allocated(arguments):
    with pytest.raises(CSGError, match='far larger than the weights in it'):
        build(dict(builder='torchvision', name='resnet50', **arguments), most_values=10**8)


def test_a_network_within_the_limit_is_built():
    values = sum(each.numel() for each in models.resnet18().parameters())
    built = build(dict(builder='torchvision', name='resnet18'), most_values=2 * values)
    assert sum(each.numel() for each in built.parameters()) == values
