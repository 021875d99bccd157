"""Compact checkpoints that hold how to build their network."""

import json
import sys
import threading
import time

import pytest
import torch
from torch import nn
from torchvision import models

import csg_seg
from csg_seg.errors import CSGError
from csg_seg.storage.builders import BUILDERS, build, decode_source, encode_source, parameters_on_meta
from experiments.zoo.network import settings_for

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


@pytest.mark.parametrize(
    ('library', 'source', 'size'),
    [
        ('segmentation_models_pytorch', dict(builder='smp', name='Unet', encoder_name='resnet18', classes=5), (64, 64)),
        (
            'monai',
            dict(builder='monai', name='UNet', spatial_dims=3, in_channels=3, out_channels=2, channels=(16, 32, 64))
            | dict(strides=(2, 2)),
            (16, 16, 16),
        ),
        (
            'transformers',
            dict(
                builder='transformers',
                name='SegformerForSemanticSegmentation',
                config=dict(id2label={'0': 'a/b', 1: 'c'}),
            ),
            (64, 64),
        ),
    ],
)
def test_a_network_of_these_libraries_needs_only_its_file(tmp_path, library, source, size):
    pytest.importorskip(library, reason=f'{library} is not installed')
    model = csg_seg.retrofit(build(source), settings_for(build(source))).eval()
    csg_seg.save_compact(model, tmp_path / 'x.safetensors', source=source)
    loaded = csg_seg.load_compact(tmp_path / 'x.safetensors').eval()
    x = torch.randn(1, 3, *size, generator=torch.Generator().manual_seed(0))
    first, second = (out if isinstance(out, torch.Tensor) else out.logits for out in (model(x), loaded(x)))
    assert torch.equal(first, second)


def test_a_transformers_network_is_built_from_its_own_settings():
    transformers = pytest.importorskip('transformers', reason='transformers is not installed')
    config = transformers.UperNetConfig(
        backbone_config=transformers.ConvNextConfig(
            depths=[1, 1, 1, 1],
            hidden_sizes=[8, 16, 32, 64],
            out_features=['stage1', 'stage2', 'stage3', 'stage4'],
        ),
        auxiliary_in_channels=32,
        num_labels=7,
    )
    config._name_or_path = 'someone/something'  # as from_pretrained notes it
    source = dict(builder='transformers', name='UperNetForSemanticSegmentation', config=config.to_diff_dict())
    built = build(decode_source(encode_source(source)))
    expected = transformers.UperNetForSemanticSegmentation(config).state_dict()
    assert {name: each.shape for name, each in built.state_dict().items()} == {
        name: each.shape for name, each in expected.items()
    }


@pytest.mark.parametrize(
    ('source', 'says'),
    [
        (dict(builder='smp', name='Unet', encoder_weights='imagenet'), 'encoder_weights is not for files'),
        (dict(builder='smp', name='Unet', encoder_name='tu-hf-hub:someone/something'), 'may be a path or an address'),
        (dict(builder='smp', name='Unet', pretrained_cfg={'file': 'x.pth'}), 'pretrained_cfg is not for files'),
        (dict(builder='monai', name='HoVerNet', pretrained_url='x'), 'pretrained_url is not for files'),
        (dict(builder='monai', name='resnet18', pretrained='x.pth'), 'pretrained is not for files'),
        (dict(builder='monai', name='UNet', act=['a', ('b', {'c': 'd/e'})]), "'d/e' may be a path or an address"),
        (dict(builder='transformers', name='X', config={'attn_implementation': 'a'}), 'read files or connect'),
        (dict(builder='transformers', name='X', config={'a': {'auto_map': {'AutoConfig': 'b'}}}), 'auto_map may make'),
        (dict(builder='transformers', name='X', config={'a': [{'backbone': 'resnet50'}]}), 'backbone may make the'),
        (dict(builder='transformers', name='X', config={'a': 'C:\\x'}), 'may be a path or an address'),
        (dict(builder='transformers', name=3, config={}), 'the name of a network must be a string'),
        (dict(builder='transformers', name='X'), "'transformers' cannot build the network"),
    ],
)
def test_sources_that_may_read_files_or_connect_are_refused_before_a_library_is_imported(source, says, monkeypatch):
    for library in ('segmentation_models_pytorch', 'monai', 'transformers'):
        monkeypatch.setitem(sys.modules, library, None)  # as if it were not installed
    with pytest.raises(CSGError, match=says):
        build(source)


@pytest.mark.parametrize(
    ('library', 'source'),
    [
        ('monai', dict(builder='monai', name='Transchex')),
        ('monai', dict(builder='monai', name='get_pretrained_resnet_medicalnet', resnet_depth=18)),
        ('transformers', dict(builder='transformers', name='TimmBackbone', config={})),
        ('transformers', dict(builder='transformers', name='BertModel', config={})),
        ('transformers', dict(builder='transformers', name='pipeline', config={})),
    ],
)
def test_other_names_of_a_library_are_no_networks(library, source):
    pytest.importorskip(library, reason=f'{library} is not installed')
    with pytest.raises(CSGError, match='has no network'):
        build(source)


def test_a_missing_library_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, 'segmentation_models_pytorch', None)
    with pytest.raises(CSGError, match="the builder 'smp' needs segmentation_models_pytorch; install it"):
        build(dict(builder='smp', name='Unet'))


def test_a_registered_builder_builds_the_network_of_a_file(tmp_path, monkeypatch):
    monkeypatch.setattr('csg_seg.storage.builders.BUILDERS', dict(BUILDERS))

    @csg_seg.register_builder('mine')
    def build_mine(*, width):
        return nn.Sequential(nn.Conv2d(3, width, 3), nn.Conv2d(width, width, 3))

    path = saved(tmp_path, build_mine(width=40), dict(builder='mine', width=40))
    assert csg_seg.load_compact(path)[1].code.shape == (9, 32)


def test_a_parameter_in_two_places_stays_one(tmp_path, monkeypatch):
    monkeypatch.setattr('csg_seg.storage.builders.BUILDERS', dict(BUILDERS))

    @csg_seg.register_builder('tied')
    def build_tied():
        net, weight = nn.Sequential(*(nn.Conv2d(40, 40, 3) for _ in range(4))), nn.Parameter(torch.ones(40, 40, 3, 3))
        net[2].weight = net[3].weight = weight
        return net

    loaded = csg_seg.load_compact(saved(tmp_path, build_tied(), dict(builder='tied')))
    assert loaded[2].weight is loaded[3].weight and loaded[2].weight.eq(1).all()


class Marked(nn.Sequential):
    """Something that a constructor may attach to a parameter, or keep one in."""

    def __init__(self, what):
        torch.manual_seed(0)
        super().__init__(*(nn.Conv2d(3 if index == 0 else 40, 40, 3) for index in range(3)), nn.Linear(40, 40))
        weight = self[3].weight
        if what == 'hook':
            weight.register_hook(lambda gradient: gradient * 0)
        elif what == 'attribute':
            weight.factor = 10
        elif what == 'dict':
            self.groups = {'fast': [weight]}
        elif what == 'closure':
            self[2].register_forward_hook(lambda module, inputs, output: output + weight.mean())
        elif what == 'class':
            self[3].weight = type('Own', (nn.Parameter,), {})(weight.detach())

    def forward(self, x):
        return self[3](self[2](self[1](self[0](x))).mean((2, 3)))


@pytest.mark.parametrize('what', ['hook', 'attribute', 'dict', 'closure', 'class', 'nothing'])
def test_what_a_constructor_does_with_parameters_stays(what, tmp_path, monkeypatch):
    monkeypatch.setattr('csg_seg.storage.builders.BUILDERS', dict(BUILDERS))
    csg_seg.register_builder('marked')(Marked)
    path = saved(tmp_path, Marked(what), dict(builder='marked', what=what))
    loaded, given = csg_seg.load_compact(path), csg_seg.load_compact(path, Marked(what))
    images = torch.ones(2, 3, 9, 9)
    assert torch.equal(loaded(images), given(images))
    for each in (loaded, given):
        each(images).sum().backward()
        weight = each[3].weight
        assert weight.grad.any() != (what == 'hook')
        assert vars(weight) == ({'factor': 10} if what == 'attribute' else {})
        assert what != 'dict' or each.groups['fast'][0] is weight
        assert (type(weight) is nn.Parameter) != (what == 'class')


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
        ({'builder': 'torchvision', 'name': 'resnet34'}, 'the source builds another network: that network has'),
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


def test_a_source_whose_convs_have_other_strides_is_refused(tmp_path):
    model = csg_seg.retrofit(models.resnet50(replace_stride_with_dilation=[False, True, True]), CSG)
    with pytest.raises(CSGError, match=r'another network: layer3.0.conv2 has stride \(2, 2\), the model has \(1, 1\)'):
        csg_seg.save_compact(model, tmp_path / 'x.safetensors', source=dict(builder='torchvision', name='resnet50'))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    'arguments', [{'num_classes': 10**9}, {'width_per_group': 10**5}, {'groups': 10**4}, {'num_classes': 10**15}]
)
def test_a_network_far_larger_than_the_file_is_never_allocated(arguments):
    with pytest.raises(CSGError, match='far larger than the weights in it'):
        build(dict(builder='torchvision', name='resnet50', **arguments), most_values=10**8)


def test_a_network_may_be_cut_out_of_a_larger_one(tmp_path, monkeypatch):
    monkeypatch.setattr('csg_seg.storage.builders.BUILDERS', dict(BUILDERS))

    @csg_seg.register_builder('cut')
    def build_cut(*, width):
        convs = nn.Sequential(nn.Conv2d(3, 32, 3), nn.Conv2d(32, 64, 3), nn.Linear(1000, width))
        return convs[:2]

    # A file of this network accounts for 93,376 values.
    always = saved(tmp_path, build_cut(width=1600), dict(builder='cut', width=1600)).rename(
        tmp_path / 'always.safetensors'
    )
    assert csg_seg.load_compact(always)[1].code.shape == (8, 32)
    monkeypatch.setattr('csg_seg.storage.compact.ALWAYS', 0)
    path = saved(tmp_path, build_cut(width=1000), dict(builder='cut', width=1000))
    assert csg_seg.load_compact(path)[1].code.shape == (8, 32)
    with pytest.raises(CSGError, match='far larger than the weights in it'):
        csg_seg.load_compact(always)


def test_a_network_within_the_limit_is_built():
    values = sum(each.numel() for each in models.resnet18().parameters())
    built = build(dict(builder='torchvision', name='resnet18'), most_values=2 * values)
    assert sum(each.numel() for each in built.parameters()) == values


def test_threads_that_build_networks_at_once_do_not_disturb_each_other():
    register, devices = nn.Module.register_parameter, []
    entered, follows = threading.Event(), threading.Event()

    def build_first():
        with parameters_on_meta():
            entered.set()
            follows.wait(10)
            time.sleep(0.1)  # so that the other thread would enter before this one leaves
            devices.append(nn.Linear(2, 2).weight.device.type)

    def build_second():
        entered.wait(10)
        follows.set()
        with parameters_on_meta():
            first.join(10)
            devices.append(nn.Linear(2, 2).weight.device.type)

    first, second = (threading.Thread(target=each) for each in (build_first, build_second))
    first.start()
    second.start()
    assert entered.wait(10)
    assert nn.Linear(2, 2).weight.device.type == 'cpu'
    second.join(20)
    assert devices == ['meta', 'meta'] and nn.Module.register_parameter is register
    assert nn.Linear(2, 2).weight.device.type == 'cpu'
