"""Counts of parameters and bytes, the printed table, and the warning about networks that grow."""

import copy
import json
import warnings

import pytest
import torch
from torch import nn
from torchvision import models

import experiments.rivals.tensor_ring  # noqa: F401 (registers a kind that is not part of the package)
from csg_seg import CSGWarning, materialise, retrofit, summarise
from csg_seg.models import CIFARResNet
from csg_seg.planning.planner import predict

CSG = {'slice_shape': (16, 16, 3, 3), 'code_dim': 128}
ODD_CSG = {'slice_shape': (12, 20, 3, 3), 'code_dim': 24}

# Trainable parameters, dense and CSG (s16 d128), of the networks that the authors' code builds:
# Omidvar et al., "Associative Convolutional Layers", AISTATS 2021, https://arxiv.org/abs/1906.04309.
# Their ResNet-18 generates only the first conv of each block.
GOLDEN = [
    ('resnet18', ['layer*.conv1'], 11_689_512, 7_527_976),
    ('resnet34', None, 21_797_672, 2_177_832),
    ('resnet50', None, 25_557_032, 15_163_432),
    ('resnet101', None, 44_549_160, 24_685_608),
]


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Conv2d(3, 31, 3)
        self.narrow = nn.Conv2d(31, 17, 3, bias=False)
        self.norm = nn.BatchNorm2d(17)
        self.widen = nn.Conv2d(17, 31, 3)
        self.point = nn.Conv2d(31, 40, 1)


CSGS = {
    'linear': ODD_CSG,
    'frozen': ODD_CSG | {'freeze_generator': True},
    'binary': ODD_CSG | {'generator': 'binary'},
    'mlp': ODD_CSG | {'generator': 'mlp', 'hidden': 5},
    'tensor ring': ODD_CSG | {'generator': 'tensor_ring', 'rank': 3},
    'residual': ODD_CSG | {'residual': 2},
    'two': [ODD_CSG | {'include': ['widen']}, ODD_CSG | {'code_dim': 9, 'generator': 'binary'}],
}


def count(model):
    return sum(parameter.numel() for parameter in model.parameters())


def state_bytes(model):
    return sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())


@pytest.mark.parametrize(('name', 'include', 'dense_params', 'stored_params'), GOLDEN)
def test_golden_numbers_of_the_authors_networks(name, include, dense_params, stored_params):
    model = getattr(models, name)()
    assert count(model) == dense_params
    retrofit(model, CSG | {'include': include})
    summary = summarise(model)
    assert count(model) == summary.stored_params == summary.trainable_params == stored_params
    assert summary.dense_params == dense_params
    assert summary.compression_ratio == pytest.approx(dense_params / stored_params)


def test_a_binary_golden_network_stores_the_generator_as_nothing():
    summary = summarise(retrofit(models.resnet34(), CSG | {'generator': 'binary'}))
    generator = 128 * 16 * 16 * 3 * 3
    assert summary.stored_params == summary.trainable_params == 2_177_832 - generator
    assert summary.dense_params == 21_797_672


@pytest.mark.parametrize('csg', CSGS.values(), ids=CSGS)
@pytest.mark.parametrize('dtype', [torch.float32, torch.float16])
def test_counts_are_the_models_own(csg, dtype):
    dense = Net().to(dtype)
    model = retrofit(copy.deepcopy(dense), csg)
    summary = summarise(model)
    assert summary.dense_params == count(dense)
    assert summary.dense_bytes == state_bytes(dense)
    assert summary.stored_params == count(model)
    assert summary.stored_bytes == state_bytes(model)
    assert summary.trainable_params == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert summary.compression_ratio == pytest.approx(count(dense) / count(model))
    weights = {name: tuple(m.weight.shape) for name, m in dense.named_modules() if isinstance(m, nn.Conv2d)}
    assert {layer.name: layer.weight_shape for layer in summary.layers} == weights


class ResNet20(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = CIFARResNet(20)
        self.head = nn.Linear(64, 10)


@pytest.mark.parametrize(
    ('csg', 'stored_params', 'generator'),
    [
        ({'code_dim': 72}, 115_426, 72 * 1296),  # counted from the authors' code too
        ({'code_dim': 56, 'generator': 'mlp', 'hidden': 18}, 114_676, (56 + 18) * 1296 + 56 * 18 + 18),
        ({'code_dim': 330, 'generator': 'tensor_ring', 'rank': 10}, 114_548, 55 * 10 * 4 * 10),
        ({'code_dim': 232, 'generator': 'tensor_ring', 'rank': 12, 'mode': 6}, 115_906, 58 * 12 * 6 * 12),
        ({'code_dim': 68, 'residual': 1}, 115_438, 68 * 1296),
    ],
)
def test_resnet20_in_one_size_with_each_generator(csg, stored_params, generator):
    summary = summarise(retrofit(ResNet20(), {'slice_shape': (12, 12, 3, 3), **csg}))
    assert summary.dense_params == 269_722
    assert summary.stored_params == summary.trainable_params == stored_params
    assert summary.generators[0].stored_params == generator


def test_frozen_and_binary_generators_differ_in_what_they_store():
    size = 24 * 12 * 20 * 3 * 3
    models = [retrofit(Net(), CSGS[name]) for name in ('linear', 'frozen', 'binary')]
    linear, frozen, binary = map(summarise, models)
    assert linear.stored_params == linear.trainable_params == frozen.stored_params
    assert frozen.trainable_params == binary.stored_params == binary.trainable_params == linear.stored_params - size
    kept = [(s.generators[0].stored_params, s.generators[0].trainable_params) for s in (linear, frozen, binary)]
    assert kept == [(size, size), (size, 0), (0, 0)]
    # A binary generator keeps its seed and the size of its values, a few bytes, in place of its signs.
    _, of_frozen, of_binary = (model.state_dict()['csg.0._extra_state'].nbytes for model in models)
    assert size * 4 - (frozen.stored_bytes - binary.stored_bytes) == of_binary - of_frozen < 200


def test_each_layer_has_its_grid_generator_and_stored_parameters():
    summary = summarise(retrofit(Net(), CSGS['two']))
    told = {layer.name: (layer.grid, layer.generator, layer.stored_params) for layer in summary.layers}
    assert told == {
        'stem': (None, None, 31 * 3 * 9),
        'narrow': ((2, 2), 1, 2 * 2 * 9),
        'widen': ((3, 1), 0, 3 * 1 * 24),
        'point': (None, None, 40 * 31),
    }
    assert [(each.generator, each.layers, each.slices) for each in summary.generators] == [
        ('linear', 1, 3),
        ('binary', 1, 4),
    ]


@pytest.mark.parametrize('model', [Net, lambda: materialise(retrofit(Net(), ODD_CSG))], ids=['dense', 'materialised'])
def test_a_dense_model_stores_its_own_size(model):
    model = model()
    summary = summarise(model)
    assert summary.stored_params == summary.dense_params == summary.trainable_params == count(Net())
    assert summary.stored_bytes == summary.dense_bytes == state_bytes(Net())
    assert summary.compression_ratio == 1.0
    assert summary.generators == ()
    assert 'no generated layers' in str(summary)


def test_a_model_without_parameters_has_a_ratio_of_one():
    assert summarise(nn.ReLU()).compression_ratio == 1.0


def test_a_module_that_holds_a_retrofitted_model_counts_the_same():
    model = retrofit(Net(), ODD_CSG)
    inner, outer = summarise(model), summarise(nn.ModuleDict({'net': model}))
    totals = ('dense_params', 'stored_params', 'trainable_params', 'dense_bytes', 'stored_bytes')
    assert {key: getattr(outer, key) for key in totals} == {key: getattr(inner, key) for key in totals}


def test_a_generator_that_two_roots_share_counts_once():
    dense = nn.Sequential(nn.Conv2d(3, 31, 3), nn.Conv2d(31, 17, 3), nn.Conv2d(17, 31, 3))
    model = retrofit(copy.deepcopy(dense), ODD_CSG)
    both = nn.ModuleList([model, model[:2]])
    summary = summarise(both)
    assert (summary.dense_params, summary.stored_params) == (count(dense), count(both))
    assert [each.layers for each in summary.generators] == [2]


def test_sparse_buffers_are_counted():
    net = Net()
    net.register_buffer('sparse', torch.eye(30).to_sparse())
    retrofit(net, CSG)
    assert summarise(net).headline()


def test_tied_parameters_count_once():
    dense = Net()
    dense.one, dense.two = nn.Linear(5, 5), nn.Linear(5, 5)
    dense.two.weight = dense.one.weight
    summary = summarise(retrofit(copy.deepcopy(dense), ODD_CSG))
    assert summary.dense_params == count(dense)
    assert summary.dense_bytes == state_bytes(dense)


@pytest.mark.parametrize('csg', CSGS.values(), ids=CSGS)
def test_to_dict_survives_json(csg):
    summary = summarise(retrofit(Net(), csg))
    told = json.loads(json.dumps(summary.to_dict()))
    assert set(told) == {
        'dense_params',
        'stored_params',
        'trainable_params',
        'compression_ratio',
        'dense_bytes',
        'stored_bytes',
        'generators',
        'layers',
    }
    assert told['compression_ratio'] == summary.compression_ratio
    assert [layer['name'] for layer in told['layers']] == ['stem', 'narrow', 'widen', 'point']
    assert [each['slice_shape'] for each in told['generators']] == [[12, 20, 3, 3]] * len(summary.generators)


def test_a_generator_lists_the_options_of_its_kind():
    csg = dict(slice_shape=(12, 20, 3, 3), code_dim=12, generator='tensor_ring', rank=3, residual=2)
    summary = summarise(retrofit(Net(), csg))
    assert summary.generators[0].options == {'rank': 3, 'mode': 4, 'residual': 2}
    assert 'generator 0: tensor_ring, rank 3, mode 4, residual 2, block' in str(summary)


def test_the_table_names_each_layer_and_why_some_stay_dense():
    summary = summarise(retrofit(Net(), CSGS['two']))
    lines = str(summary).splitlines()
    (narrow,) = (line.split() for line in lines if line.startswith('narrow'))
    assert narrow == ['narrow', '17x31x3x3', '2x2', '1', '4,743', '36']
    (widen,) = (line.split() for line in lines if line.startswith('widen'))
    assert widen == ['widen', '31x17x3x3', '3x1', '0', '4,743', '72']
    assert "left dense, the network's first conv: stem" in lines
    assert 'left dense, no generator of its kernel size: point' in lines
    assert any(line.startswith('generator 0: linear') for line in lines)
    (binary,) = (line for line in lines if line.startswith('generator 1: binary'))
    assert '0 parameters generate 4 slices of 1 layers' in binary
    assert f'{1 / summary.compression_ratio:.2f}x LARGER' in lines[-1]
    assert f'{summary.stored_params:,}' in lines[-1]
    assert f'{summary.dense_params:,}' in lines[-1]


def test_table_columns_are_aligned():
    table = str(summarise(retrofit(Net(), ODD_CSG))).splitlines()[:3]
    assert table[0].startswith('generated layer')
    assert len({len(line) for line in table}) == 1


def test_summarise_does_not_change_the_model():
    model = retrofit(Net(), ODD_CSG)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    summarise(model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert list(model.state_dict()) == list(before)


# --- larger than dense ---


def unet(width):
    """Few layers for a generator of 294,912 parameters, as in a narrow network."""
    return nn.Sequential(nn.Conv2d(3, width, 3), nn.Conv2d(width, width, 3), nn.Conv2d(width, width, 3))


BIG = {'slice_shape': (16, 16, 3, 3), 'code_dim': 128}


@pytest.mark.parametrize('kind', [{}, {'generator': 'mlp', 'hidden': 8}, {'residual': 2}])
def test_a_network_that_grows_is_warned_about_with_both_counts(kind):
    with pytest.warns(CSGWarning) as told:
        model = retrofit(unet(64), {**BIG, **kind})
    summary = summarise(model)
    (text,) = [str(each.message) for each in told]
    assert f'stores {summary.stored_params:,} parameters, more than the {summary.dense_params:,} of the dense' in text
    assert f'csg[0] stores {summary.generators[0].stored_params:,} for its generator' in text
    assert 'Smaller slices, a lower code_dim' in text
    assert text in str(summary) and 'x LARGER' in summary.headline()


def test_only_the_dict_that_costs_more_than_it_saves_is_blamed():
    wide = nn.Sequential(unet(16), nn.Conv2d(16, 16, 1), nn.Conv2d(16, 16, 1))
    with pytest.warns(CSGWarning, match=r'csg\[1\] stores 16,384') as told:
        retrofit(
            wide, [{'slice_shape': (16, 16, 3, 3), 'code_dim': 1}, {'slice_shape': (16, 16, 1, 1), 'code_dim': 64}]
        )
    assert 'csg[0]' not in str(told[0].message)


@pytest.mark.parametrize('csg', [BIG | {'code_dim': 16}, BIG | {'generator': 'binary'}])
def test_a_network_that_shrinks_gives_no_warning(csg):
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        model = retrofit(unet(128), csg)
    assert not summarise(model).describe_growth() and 'x smaller' in summarise(model).headline()


def test_predicting_settings_that_grow_the_network_warns():
    with pytest.warns(CSGWarning, match='more than the .* of the dense network'):
        found = predict(unet(64), BIG)
    assert found.compression_ratio < 1


def test_an_extra_state_that_is_not_a_tensor_takes_no_bytes():
    class Noted(nn.Identity):
        def get_extra_state(self):
            return {'note': 'old'}

    model, noted = unet(64), unet(64).append(Noted())
    assert summarise(noted).stored_bytes == summarise(model).stored_bytes
