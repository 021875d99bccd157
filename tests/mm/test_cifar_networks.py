"""The paper's CIFAR-10 networks: what they are made of, and every row of its table of counts."""

import re

import pytest
import torch
from conftest import ROOT
from mmengine.config import Config
from torch import nn

from csg_seg import models, retrofit, summarise
from csg_seg.errors import CSGError
from csg_seg.layers.conv import CSGConv
from csg_seg.mm.model import build_model

# Omidvar et al., AISTATS 2021, counted from the authors' code: network, and what each setting stores.
GOLDEN = {
    'cifar10/resnet20_b192-200e_cifar10': {
        '': 269_722,
        'csg-s12-d72': 115_426,
        'csg-s16-d72': 176_698,
        'csg-s16-d128': 312_218,
    },
    'cifar10/resnet56_b192-200e_cifar10': {'': 853_018, 'csg-s12-d72': 160_450, 'csg-s16-d128': 347_162},
    'cifar10/resnet110_b192-200e_cifar10': {'': 1_727_962, 'csg-s12-d72': 227_986, 'csg-s16-d128': 399_578},
    'cifar10/densenet-bc40-k36_b128-200e_cifar10': {'': 1_542_682, 'csg-s12-d72': 842_842},
    'cifar10/densenet-bc40-k48_b128-200e_cifar10': {'': 2_733_130, 'csg-s12-d72': 1_416_394},
    'cifar10/mobilenet-v2_b192-200e_cifar10': {
        '': 2_296_922,
        'csg-1x1-s16-d16': 1_595_322,
        'csg-1x1-s16-d16-binary': 1_591_226,
    },
    'cifar10/shufflenet-v2-05x_b192-200e_cifar10': {'': 352_042, 'csg-1x1-s16-d16': 171_818},
    'imagenet/resnet18_8xb32_in1k': {'csg-s16-d128': 1_609_256, 'csg-s16-d128-conv1': 7_527_976},
    'imagenet/resnet34_8xb32_in1k': {'csg-s16-d128': 2_177_832},
    'imagenet/resnet50_8xb32_in1k': {'csg-s16-d128': 15_163_432},
    'imagenet/resnet101_8xb32_in1k': {'csg-s16-d128': 24_685_608},
}
# The dense networks of ImageNet, from the same source; their configs are mmpretrain's own.
DENSE = {18: 11_689_512, 34: 21_797_672, 50: 25_557_032, 101: 44_549_160}
ROWS = [(leaf, prefix, count) for leaf, counts in GOLDEN.items() for prefix, count in counts.items()]


@pytest.mark.parametrize(('leaf', 'prefix', 'count'), ROWS, ids=lambda value: str(value).split('/')[-1])
def test_every_count_of_the_paper_to_the_single_parameter(leaf, prefix, count):
    folder, name = leaf.split('/')
    path = ROOT / 'configs' / folder / f'{prefix}{"_" if prefix else ""}{name}.py'
    summary = summarise(build_model(Config.fromfile(path)))
    assert summary.trainable_params == count
    assert summary.dense_params == dense_count(leaf)


def dense_count(leaf):
    return GOLDEN[leaf].get('') or DENSE[int(leaf.removeprefix('imagenet/resnet').split('_')[0])]


def test_the_table_of_the_documents_has_these_counts():
    text = (ROOT / 'docs' / 'classification.md').read_text()
    rows = re.findall(r'^\| ([^|]+, (?:CIFAR-10|ImageNet)) \| (\S+) \| (.+?) \| (.+?) \|$', text, flags=re.MULTILINE)
    for (network, dense, stored, ratios), leaf in zip(rows, GOLDEN, strict=True):
        assert int(dense.replace(',', '')) == dense_count(leaf), network
        counts = [int(count.replace(',', '')) for count in re.findall(r'\d+(?:,\d{3})+', stored)]
        assert counts and set(counts) <= set(GOLDEN[leaf].values()), network
        assert ratios == ', '.join(f'{dense_count(leaf) / count:.2f}' for count in counts), network


def cifar_model(name, **backbone):
    cfg = Config.fromfile(ROOT / 'configs' / 'cifar10' / f'{name}_cifar10.py')
    cfg.model.backbone.update(backbone)
    return build_model(cfg).eval()


@pytest.mark.parametrize(
    ('name', 'side'),
    [
        ('resnet20_b192-200e', 8),
        ('densenet-bc40-k36_b128-200e', 8),
        ('mobilenet-v2_b192-200e', 4),
        ('shufflenet-v2-05x_b192-200e', 4),
    ],
)
def test_a_network_keeps_the_resolution_that_32_pixels_need(name, side):
    features = cifar_model(name).backbone(torch.zeros(2, 3, 32, 32))[-1]
    assert features.shape[2:] == (side, side)


def test_shortcuts_add_no_parameters_and_keep_every_second_pixel():
    network = models.CIFARResNet(20)
    assert not any('downsample' in name or 'shortcut' in name for name, _ in network.named_parameters())
    block = network.layer2[0].eval()
    for conv in (block.conv1, block.conv2):
        nn.init.zeros_(conv.weight)
    x = torch.rand(1, 16, 8, 8)
    assert torch.equal(block(x), torch.cat([x[:, :, ::2, ::2], torch.zeros(1, 16, 4, 4)], 1))
    around = models.CIFARResNet(20, zeros='around').layer2[0].eval()
    for conv in (around.conv1, around.conv2):
        nn.init.zeros_(conv.weight)
    assert torch.equal(around(x)[:, 8:24], x[:, :, ::2, ::2])
    assert around(x)[:, :8].abs().max() == around(x)[:, 24:].abs().max() == 0


@pytest.mark.parametrize(
    ('options', 'says'),
    [({'depth': 21}, '6 n'), ({'depth': 'abc'}, '6 n'), ({'depth': 20, 'zeros': 'left'}, 'zeros must')],
)
def test_a_network_that_does_not_exist_is_refused(options, says):
    with pytest.raises(CSGError, match=says):
        models.CIFARResNet(**options)


def test_a_densenet_that_does_not_exist_is_refused():
    with pytest.raises(CSGError, match='6 n'):
        cifar_model('densenet-bc40-k36_b128-200e', depth=41)


def test_the_networks_need_no_mmengine_to_be_retrofitted_and_run():
    network = retrofit(models.CIFARMobileNetV2(), dict(slice_shape=(16, 16, 1, 1), code_dim=16, include=['*.conv1']))
    assert network(torch.zeros(1, 3, 32, 32))[0].shape == (1, 1280, 4, 4)


def test_mmengine_initialises_a_backbone_from_a_file(tmp_path):
    trained = models.CIFARResNet(20)
    torch.save(trained.state_dict(), tmp_path / 'trained.pth')
    model = cifar_model(
        'resnet20_b192-200e', init_cfg=dict(type='Pretrained', checkpoint=str(tmp_path / 'trained.pth'))
    )
    model.init_weights()
    assert torch.equal(model.backbone.layer3[2].conv2.weight, trained.layer3[2].conv2.weight)


def test_the_small_shufflenet_starts_at_kaiming_variance():
    torch.manual_seed(0)
    model = cifar_model('shufflenet-v2-05x_b192-200e')
    model.init_weights()
    convs = [module for module in model.backbone.modules() if isinstance(module, nn.Conv2d) and module.groups == 1]
    assert len(convs) == 37  # stem, last, 3 in each of 3 down blocks, 2 in each of 13 others
    for conv in convs:
        std = (2 / (conv.out_channels * conv.weight[0, 0].numel())) ** 0.5
        assert conv.weight.std().item() == pytest.approx(std, rel=5 * (2 * conv.weight.numel()) ** -0.5)


def test_a_retrofitted_shufflenet_starts_its_dense_convs_as_mmpretrain_does():
    model = build_model(
        Config.fromfile(ROOT / 'configs' / 'imagenet' / 'csg-1x1-s16-d16_shufflenet-v2-1x_16xb64_in1k.py')
    )
    codes = {name: tensor.clone() for name, tensor in model.state_dict().items() if name.endswith('.code')}
    model.init_weights()
    assert len(codes) == 19
    assert all(torch.equal(model.state_dict()[name], code) for name, code in codes.items())
    backbone = model.backbone
    assert isinstance(backbone.layers[0][1].branch2[0].conv, CSGConv)
    # mmpretrain draws with a std of 1 over the input channels.
    assert backbone.layers[3].conv.weight.std().item() == pytest.approx(1 / 464, rel=0.02)
