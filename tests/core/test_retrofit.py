"""Retrofit and materialise: which layers are generated, what stays the same, what is refused."""

import copy

import pytest
import torch
from odd_network import CSG, Net, assert_refused, generated, images
from torch import nn
from torch.nn.utils import parametrize, prune
from torchvision.models import resnet18, resnet50

from csg_seg import fit, load_generators, materialise, retrofit, save_compact, summarise
from csg_seg.errors import CSGError
from csg_seg.layers.bank import find_bank
from csg_seg.layers.conv import CSGConv, generated_convs
from csg_seg.retrofitting.selection import Cause

RESNET_CSG = {'slice_shape': (16, 16, 3, 3), 'code_dim': 128}


def by_pruning(module, name):
    prune.l1_unstructured(module, name, 0.5)
    return lambda: prune.remove(module, name)


def by_parametrisation(module, name):
    parametrize.register_parametrization(module, name, nn.Tanh())
    return lambda: parametrize.remove_parametrizations(module, name)


def by_weight_norm(module, name):
    nn.utils.weight_norm(module, name)
    return lambda: nn.utils.remove_weight_norm(module, name)


# --- which layers are generated ---


def test_every_fitting_conv_but_the_first_is_generated():
    assert generated(retrofit(Net(), CSG)) == ['body.0', 'body.3', 'tiny', 'head']


def test_left_dense_convs_are_named_with_the_reason():
    model = Net()
    model.body[3].weight.requires_grad_(False)
    retrofit(model, CSG | {'code_dim': 300, 'exclude': ['head']})
    reasons = {layer.name: layer.left_dense for layer in summarise(model).layers}
    assert reasons == {
        'stem': "the network's first conv",
        'body.0': None,
        'body.3': 'frozen (requires_grad is False)',
        'grouped': 'grouped: 17 channels to a group and 20 to a slice',
        'point': 'no generator of its kernel size',
        'tiny': 'costs more generated: 600 against 558',
        'head': 'excluded',
    }


@pytest.mark.parametrize(('code_dim', 'costs_more'), [(278, False), (279, True), (280, True)])
def test_a_layer_that_would_not_shrink_stays_dense_and_is_named(code_dim, costs_more):
    # tiny: 2 x 31 x 9 = 558 values, a grid of 1 x 2.
    summary = summarise(retrofit(Net(), CSG | {'code_dim': code_dim}))
    (tiny,) = (layer for layer in summary.layers if layer.name == 'tiny')
    assert (tiny.generator is None) == costs_more
    if costs_more:
        assert f'left dense, costs more generated: {2 * code_dim:,} against 558: tiny' in str(summary)


@pytest.mark.parametrize(
    ('change', 'names'),
    [
        ({'include': ['stem']}, ['stem']),
        ({'include': ['stem', 'head']}, ['stem', 'head']),
        ({'include': ['st*', 'head']}, ['head']),
        ({'include': ['*']}, ['body.0', 'body.3', 'tiny', 'head']),
        ({'include': ['body']}, ['body.0', 'body.3']),
        ({'include': 'body.3'}, ['body.3']),
        ({'include': ['body', 'head'], 'exclude': ['body.0']}, ['body.3', 'head']),
        ({'exclude': ['body']}, ['tiny', 'head']),
        ({'exclude': ['*.0', 'head']}, ['body.3', 'tiny']),
    ],
)
def test_include_and_exclude_choose_the_layers(change, names):
    assert generated(retrofit(Net(), CSG | change)) == names


def test_a_grouped_conv_is_generated_by_slices_no_wider_than_its_groups():
    assert generated(retrofit(Net(), CSG | {'include': ['grouped', 'head']})) == ['head']
    narrow = {'slice_shape': (12, 17, 3, 3), 'code_dim': 9, 'include': ['grouped']}
    assert generated(retrofit(Net(), [CSG, narrow])) == ['body.0', 'body.3', 'grouped', 'tiny', 'head']


def test_a_frozen_conv_keeps_its_weight():
    model = Net()
    model.head.weight.requires_grad_(False)
    kept = model.head.weight
    retrofit(model, CSG)
    assert type(model.head) is nn.Conv2d
    assert model.head.weight is kept


def test_a_layer_goes_to_the_first_dict_that_takes_it():
    model = retrofit(Net(), [CSG | {'include': ['body.3', 'head']}, CSG | {'code_dim': 9}])
    owners = {name: [bank is conv.generator for bank in model.csg].index(True) for name, conv in generated_convs(model)}
    assert owners == {'body.0': 1, 'body.3': 0, 'tiny': 1, 'head': 0}
    assert [conv.code.shape[1] for _, conv in generated_convs(model)] == [9, 24, 9, 24]


def test_two_kernel_sizes_take_two_dicts():
    model = retrofit(Net(), [CSG, {'slice_shape': (12, 20, 1, 1), 'code_dim': 16}])
    assert model.point.generator is model.csg[1]
    assert model.head.generator is model.csg[0]
    # The reason is that of the dict for the conv's kernel size.
    assert find_bank(model).left_dense['grouped'].cause is Cause.GROUPED


def test_a_conv_left_dense_by_one_dict_may_be_taken_by_the_next():
    model = retrofit(Net(), [CSG | {'exclude': ['head']}, CSG | {'include': ['head'], 'code_dim': 9}])
    assert model.head.generator is model.csg[1]
    assert 'head' not in model.csg.left_dense


@pytest.mark.parametrize('root', [True, False])
def test_any_module_may_be_the_root(root):
    outer = nn.ModuleDict({'net': Net()})
    retrofit(outer if root else outer['net'], CSG)
    assert (find_bank(outer) is not None) == root
    assert (find_bank(outer['net']) is not None) != root
    assert outer['net'](images()).shape == (2, 5, 5)


def test_a_plain_subclass_of_conv_is_generated():
    class Named(nn.Conv2d):
        def label(self):
            return 'mine'

    model = Net()
    model.head = Named(31, 17, 3, padding=1)
    retrofit(model, CSG)
    assert isinstance(model.head, CSGConv)
    out = model.eval()(images())
    assert torch.equal(materialise(model)(images()), out)


def test_the_global_random_state_is_left_alone():
    model = Net()
    before = torch.get_rng_state()
    retrofit(model, CSG)
    assert torch.equal(torch.get_rng_state(), before)


def test_retrofit_is_reproducible_and_follows_the_seed():
    one, two, other = (retrofit(Net(), CSG | {'seed': seed}).state_dict() for seed in (3, 3, 4))
    assert 'head.code' in one and all(torch.equal(one[name], two[name]) for name in one)
    assert not torch.equal(one['head.code'], other['head.code'])
    assert not torch.equal(one['csg.0.weight'], other['csg.0.weight'])


def test_other_parameters_stay_the_same_objects():
    model = Net()
    before = dict(model.named_parameters())
    retrofit(model, CSG)
    after = dict(model.named_parameters())
    assert set(before) - set(after) == {f'{name}.weight' for name in generated(model)}
    same = set(after) & set(before)
    assert 'stem.weight' in same and all(after[name] is before[name] for name in same)


# --- materialise ---


def variants():
    yield 'plain', {}
    yield 'no bias', {'bias': False}
    yield 'dilation', {'dilation': 2, 'padding': 2}
    yield 'stride', {'stride': (2, 1)}
    yield 'asymmetric padding', {'padding': (1, 2)}
    yield 'reflect', {'padding': (1, 2), 'padding_mode': 'reflect'}
    yield 'circular', {'padding': 1, 'padding_mode': 'circular'}
    yield 'replicate', {'padding': 'same', 'padding_mode': 'replicate'}
    yield 'same', {'padding': 'same', 'dilation': (1, 3)}
    yield 'valid', {'padding': 'valid'}


@pytest.mark.parametrize('change', [{}, {'generator': 'binary'}, {'layout': 'flat'}], ids=['linear', 'binary', 'flat'])
@pytest.mark.parametrize('options', [each for _, each in variants()], ids=[name for name, _ in variants()])
def test_each_conv_option_survives(options, change):
    class One(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.first = nn.Conv2d(3, 3, 1)
            self.conv = nn.Conv2d(31, 17, 3, **options)

        def forward(self, x):
            return self.conv(x)

    dense, model = One(), retrofit(One(), CSG | change)
    x = images(channels=31)
    before = model(x)
    with torch.no_grad():
        dense.conv.weight.copy_(model.conv.generate_weight())
    assert torch.equal(before, dense(x))
    materialise(model)
    assert torch.equal(model(x), before)
    assert repr(model) == repr(dense)


@pytest.mark.parametrize('network', [resnet18, resnet50])
@pytest.mark.parametrize('kind', ['linear', 'binary'])
def test_materialise_leaves_a_resnets_outputs_unchanged(network, kind):
    torch.manual_seed(0)
    dense = network()
    model = retrofit(copy.deepcopy(dense), RESNET_CSG | {'generator': kind}).eval()
    x = images(size=64)
    with torch.no_grad():
        before = model(x)
        after = materialise(model)(x)
    assert torch.equal(after, before)
    assert {name: type(module) for name, module in model.named_modules()} == {
        name: type(module) for name, module in dense.named_modules()
    }
    assert [(name, tensor.shape, tensor.dtype) for name, tensor in model.state_dict().items()] == [
        (name, tensor.shape, tensor.dtype) for name, tensor in dense.state_dict().items()
    ]
    dense.load_state_dict(model.state_dict())
    with torch.no_grad():
        assert torch.equal(dense.eval()(x), before)


@pytest.mark.parametrize('csg', [CSG, [CSG | {'include': ['head']}, CSG | {'code_dim': 9}]])
def test_materialise_gives_the_dense_state_dict_back_in_order(csg):
    dense = Net()
    model = materialise(retrofit(Net(), csg))
    assert [(name, tensor.shape) for name, tensor in model.state_dict().items()] == [
        (name, tensor.shape) for name, tensor in dense.state_dict().items()
    ]
    assert [name for name, _ in model.named_parameters()] == [name for name, _ in dense.named_parameters()]
    assert repr(model) == repr(dense)
    model.load_state_dict(dense.state_dict())
    assert torch.equal(model.eval()(images()), dense.eval()(images()))


def test_materialised_weights_are_leaves_that_train():
    model = materialise(retrofit(Net(), CSG))
    assert model.head.weight.is_leaf
    assert model.head.weight.is_contiguous()
    kept = model.head.weight.detach().clone()
    model(images()).square().mean().backward()
    torch.optim.SGD(model.parameters(), lr=1.0).step()
    assert not torch.equal(model.head.weight, kept)


def test_materialise_of_a_copy_leaves_the_original_generated():
    model = retrofit(Net(), CSG).eval()
    before = model(images())
    materialise(copy.deepcopy(model))
    assert generated(model) == ['body.0', 'body.3', 'tiny', 'head']
    assert torch.equal(model(images()), before)


def test_retrofit_after_materialise_takes_other_settings():
    model = retrofit(materialise(retrofit(Net(), CSG)), CSG | {'code_dim': 9})
    assert model.head.code.shape[1] == 9
    model.load_state_dict(retrofit(Net(seed=1), CSG | {'code_dim': 9}).state_dict())


def test_materialise_through_a_wrapper_leaves_no_generator_behind():
    model = retrofit(Net(), CSG)
    materialise(nn.DataParallel(model))
    assert list(model.state_dict()) == list(Net().state_dict())


@pytest.mark.parametrize('again', [False, True])
def test_materialise_of_a_dense_model_is_refused(again):
    model = materialise(retrofit(Net(), CSG)) if again else Net()
    with pytest.raises(CSGError, match='no generated layer; retrofit it first'):
        materialise(model)


# --- refusals ---


def test_an_empty_list_is_refused():
    assert_refused(Net(), [], r'must be a dict with slice_shape and code_dim, a list of such dicts, .*; got \[\]')


@pytest.mark.parametrize('csg', [None, 5])
def test_settings_of_another_type_are_refused(csg):
    assert_refused(Net(), csg, 'dict')


def test_a_second_dict_that_takes_nothing_is_refused():
    message = r'csg\[1\] takes no layer: earlier dicts took body\.0 \(4 layers that fit it\); narrow their include'
    assert_refused(Net(), [CSG, CSG], message)


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        (
            {'slice_shape': (12, 20, 5, 5)},
            r'fits 5x5 kernels, the convs of the model have 1x1, 3x3; change the last numbers',
        ),
        (
            {'slice_shape': (12, 20, 3, 1)},
            r'fits 3x1 kernels, the convs of the model have 1x1, 3x3; change the last numbers',
        ),
        ({'code_dim': 5000}, r'csg\[0\] takes no layer: .*costs more generated.*lower code_dim'),
        ({'exclude': ['*']}, r'csg\[0\] takes no layer: .*excluded.*widen include'),
        ({'include': []}, r'csg\[0\] takes no layer: .*not included.*widen include'),
        ({'include': ['grouped']}, r'csg\[0\] takes no layer: .*to a group'),
        ({'include': ['st*']}, r"csg\[0\] takes no layer: .*the network's first conv"),
        ({'include': ['heed']}, r"include pattern 'heed' names no conv of the model; the nearest are head"),
        ({'include': ['body', 'heed']}, r"include pattern 'heed' names no conv of the model; the nearest are head"),
        ({'exclude': ['heed']}, r"exclude pattern 'heed' names no conv of the model; the nearest are head"),
        ({'include': ['body.1']}, r"include pattern 'body.1' names no conv"),
        ({'include': ['Body']}, r"include pattern 'Body' names no conv"),
        ({'code_dim': 0}, r'csg\[0\]: code_dim must be an integer'),
    ],
)
def test_settings_that_fit_no_layer_are_refused_with_a_remedy(change, message):
    assert_refused(Net(), CSG | change, message)


def test_a_model_without_convs_is_refused():
    assert_refused(nn.Linear(3, 3), CSG, 'the model has no conv at all; retrofit a network that has')


def test_a_frozen_model_is_refused():
    assert_refused(Net().requires_grad_(False), CSG, r'takes no layer: .*frozen')


@pytest.mark.parametrize('wrap', [lambda net: net, lambda net: nn.ModuleDict({'net': net})])
def test_a_retrofitted_model_is_refused(wrap):
    assert_refused(wrap(retrofit(Net(), CSG)), CSG, 'already retrofitted; materialise it first')


def test_layers_of_several_types_are_refused():
    model = Net()
    model.head.half()
    assert_refused(model, CSG | {'include': ['body', 'head']}, r'head: .* is torch.float16 on cpu, that of body')
    model.head.float().to('meta')
    with pytest.raises(CSGError, match=r'head: .* is torch.float32 on meta, that of body'):
        retrofit(model, CSG | {'include': ['body', 'head']})


def test_a_pruned_hidden_layer_is_not_stored(tmp_path):
    model = retrofit(Net(), CSG | {'generator': 'mlp', 'hidden': 7})
    prune.l1_unstructured(model.csg[0], 'hidden_weight', 0.5)
    with pytest.raises(CSGError, match='has a parameter that is pruned or parametrised'):
        save_compact(model, tmp_path / 'x.safetensors')
    prune.remove(model.csg[0], 'hidden_weight')
    biased = next(conv for _, conv in generated_convs(model) if conv.bias is not None)
    prune.l1_unstructured(biased, 'bias', 0.5)  # is computed in a plain conv too
    materialise(model)


@pytest.mark.parametrize('compute', [by_pruning, by_parametrisation, by_weight_norm])
@pytest.mark.parametrize('of_code', [True, False])
def test_codes_and_generators_that_are_computed_are_not_stored(compute, of_code, tmp_path):
    model = retrofit(Net(), CSG)
    name, conv = next(generated_convs(model))
    undo = compute(conv, 'code') if of_code else compute(conv.generator, 'weight')
    weight = conv.weight
    for use in (materialise, lambda model: save_compact(model, tmp_path / 'x.safetensors')):
        with pytest.raises(CSGError, match=f'{name} has a parameter that is pruned or parametrised; call prune.remove'):
            use(model)
    assert not list(tmp_path.iterdir())
    undo()
    save_compact(model, tmp_path / 'x.safetensors')
    assert torch.equal(materialise(model).get_submodule(name).weight, weight)


@pytest.mark.parametrize('compute', [by_pruning, by_parametrisation, by_weight_norm])
def test_codes_that_are_computed_are_not_loaded_or_drawn(compute):
    model, other = retrofit(Net(), CSG), retrofit(Net(), CSG | {'seed': 1})
    name, conv = next(generated_convs(model))
    undo = compute(conv, 'code')
    before = copy.deepcopy(model.state_dict())
    for act in (
        lambda: model.load_state_dict(model.state_dict()),
        lambda: fit(model, Net().state_dict()),
        lambda: load_generators(model, other.state_dict()),
        conv.reset_parameters,
    ):
        with pytest.raises(CSGError, match='has a parameter that is pruned or parametrised; call prune.remove'):
            act()
        assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    undo()
    load_generators(model, other.state_dict())


def test_codes_that_are_buffers_are_materialised():
    model = retrofit(Net(), CSG)
    name, conv = next(generated_convs(model))
    code, weight = conv.code.detach(), conv.weight
    del conv.code
    conv.register_buffer('code', code)
    assert torch.equal(materialise(model).get_submodule(name).weight, weight)


def test_a_wrapped_model_is_refused():
    assert_refused(nn.DataParallel(Net()), CSG, 'wrapped in DataParallel; give the network inside, model.module')


@pytest.mark.parametrize('value', [3, None, nn.Identity()])
def test_a_model_with_an_attribute_of_the_banks_name_is_refused(value):
    model = Net()
    model.csg = value
    assert_refused(model, CSG, "attribute named 'csg', which the generators need; rename that attribute")
