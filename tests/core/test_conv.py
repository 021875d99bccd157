import copy
import io

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import prune
from torch.utils.checkpoint import checkpoint
from torchvision.models import resnet18
from two_convs import BEYOND, CSG, RESNET_CSG, Net, assert_same_state, batch, build, gradients, snapshot, train

from csg_seg import materialise, retrofit
from csg_seg.errors import CSGError
from csg_seg.generators.slices import split
from csg_seg.layers.bank import find_bank
from csg_seg.layers.conv import CSGConv, generated_convs

KINDS = [{}, {'generator': 'binary'}, {'freeze_generator': True}, {'layout': 'flat'}, *BEYOND]


# --- forward and backward ---


@pytest.mark.parametrize('change', KINDS)
def test_a_generated_conv_convolves_with_its_generated_weight(change):
    model = build(**change)
    x = torch.randn(2, 17, 9, 9, generator=torch.Generator().manual_seed(0))
    wanted = F.conv2d(x, model.widen.generate_weight(), model.widen.bias, stride=2)
    assert torch.equal(model.widen(x), wanted)


def test_gradients_are_the_dense_weights_by_the_chain_rule():
    model = build()
    dense = materialise(copy.deepcopy(model))
    x, target = batch()
    for net in (model, dense):
        F.cross_entropy(net(x), target).backward()
    rows = model.csg[0].weight.detach().flatten(1)
    of_generator = torch.zeros_like(rows)
    for name in ('narrow', 'widen'):
        conv = model.get_submodule(name)
        of_slices = split(dense.get_submodule(name).weight.grad, CSG['slice_shape']).flatten(1)
        torch.testing.assert_close(conv.code.grad, of_slices @ rows.T)
        of_generator += conv.code.detach().T @ of_slices
    torch.testing.assert_close(model.csg[0].weight.grad.flatten(1), of_generator)


@pytest.mark.parametrize('change', [{}, {'generator': 'binary'}, {'layout': 'flat'}])
def test_gradients_reach_every_code_and_the_generator(change):
    model = build(**change)
    x, target = batch()
    F.cross_entropy(model(x), target).backward()
    for _, conv in generated_convs(model):
        covered = split(torch.ones(conv.weight_shape), CSG['slice_shape'], layout=change.get('layout', 'block'))
        # In the flat layout the last slices may lie in the overhang as a whole.
        used = covered.flatten(1).any(dim=1)
        assert torch.equal(conv.code.grad.abs().sum(dim=1) > 0, used)
        assert used.all() or change.get('layout') == 'flat'
    assert ('csg.0.weight' in gradients(model)) == (change.get('generator') != 'binary')
    if 'csg.0.weight' in gradients(model):
        assert (model.csg[0].weight.grad.flatten(1).abs().sum(dim=1) > 0).all()


@pytest.mark.parametrize('change', KINDS)
def test_a_small_net_trains_and_only_a_free_generator_moves(change):
    model = build(**change)
    generator = model.csg[0].weight.detach().clone()
    codes = model.narrow.code.detach().clone()
    losses = train(model)
    assert losses[-1] < 0.5 * losses[0]
    is_frozen = 'freeze_generator' in change or change.get('generator') == 'binary'
    assert torch.equal(model.csg[0].weight, generator) == is_frozen
    assert not torch.equal(model.narrow.code, codes)


def test_a_training_step_on_the_same_seeds_is_reproducible():
    one, two = build(), build()
    assert train(one, steps=3) == train(two, steps=3)
    assert_same_state(one, snapshot(two))


@pytest.mark.parametrize('change', KINDS)
def test_a_deepcopy_trains_apart_from_its_original(change):
    model = build(**change)
    kept = snapshot(model)
    twin = copy.deepcopy(model)
    assert find_bank(twin)[0] is not find_bank(model)[0]
    assert {conv.generator for _, conv in generated_convs(twin)} == {find_bank(twin)[0]}
    losses = train(twin, steps=3)
    assert_same_state(model, kept)
    assert train(model, steps=3) == losses


@pytest.mark.parametrize('change', KINDS)
def test_a_pickled_model_comes_back_whole(change):
    model = build(**change)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    twin = torch.load(file, weights_only=False)
    x, _ = batch()
    assert torch.equal(twin.eval()(x), model.eval()(x))
    assert {conv.generator for _, conv in generated_convs(twin)} == {find_bank(twin)[0]}
    assert train(twin.train(), steps=2) == train(model.train(), steps=2)
    with pytest.raises(CSGError, match='take another checkpoint'):
        twin.load_state_dict({name: each for name, each in twin.state_dict().items() if name != 'widen.code'})


def test_a_sequential_root_still_runs():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 31, 3), nn.ReLU(), nn.Conv2d(31, 17, 3))
    retrofit(model, CSG)
    x, _ = batch()
    before = model(x)
    assert torch.equal(materialise(model)(x), before)


# --- precision, compilation, checkpointing ---


def test_autocast_generates_and_convolves_in_half_precision():
    model = build().eval()
    dtypes = []
    model.widen.register_forward_hook(lambda conv, _input, output: dtypes.extend([conv.weight.dtype, output.dtype]))
    x, _ = batch()
    with torch.no_grad():
        wanted = model(x)
        for forward in (model, model.forward):  # weights made ahead, and one by one
            dtypes.clear()
            with torch.autocast('cpu', dtype=torch.bfloat16):
                half = forward(x)
            assert dtypes == [torch.bfloat16, torch.bfloat16]
            torch.testing.assert_close(half.float(), wanted, rtol=0.05, atol=0.02)


def test_gradients_under_autocast_are_float32_and_near():
    model = build()
    x, target = batch()
    F.cross_entropy(model(x), target).backward()
    wanted = gradients(model)
    model.zero_grad()
    with torch.autocast('cpu', dtype=torch.bfloat16):
        loss = F.cross_entropy(model(x), target)
    loss.backward()
    for name in ('narrow.code', 'widen.code', 'csg.0.weight'):
        got = gradients(model)[name]
        assert got.dtype == torch.float32
        assert (got - wanted[name]).norm() < 0.1 * wanted[name].norm()


@pytest.mark.parametrize('dtype', [torch.float64, torch.bfloat16])
def test_casting_the_model_casts_codes_and_generator(dtype):
    x, _ = batch()
    for change in KINDS:
        model = build(**change).eval()
        with torch.no_grad():
            wanted = model(x)
            got = model.to(dtype)(x.to(dtype))
        assert got.dtype == dtype
        torch.testing.assert_close(got.float(), wanted, rtol=0.1, atol=0.05)


@pytest.fixture(scope='module')
def generated_resnet18():
    torch.manual_seed(0)
    return retrofit(resnet18(), RESNET_CSG).eval()


def test_compile_makes_one_graph_of_resnet18(generated_resnet18):
    torch._dynamo.reset()
    explanation = torch._dynamo.explain(generated_resnet18)(torch.randn(1, 3, 64, 64))
    assert (explanation.graph_count, explanation.graph_break_count) == (1, 0)


def test_a_compiled_resnet18_gives_the_same_outputs(generated_resnet18):
    torch._dynamo.reset()
    x = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    compiled = torch.compile(generated_resnet18, backend='eager', fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), generated_resnet18(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('change', KINDS)
def test_a_compiled_net_gives_the_same_outputs_and_gradients(change):
    torch._dynamo.reset()
    model = build(**change)
    compiled = torch.compile(copy.deepcopy(model), backend='aot_eager', fullgraph=True)
    x, target = batch()
    for net in (model, compiled):
        F.cross_entropy(net(x), target).backward()
    torch.testing.assert_close(compiled(x), model(x))
    got = {name.removeprefix('_orig_mod.'): gradient for name, gradient in gradients(compiled).items()}
    wanted = gradients(model)
    assert got.keys() == wanted.keys()
    for name, gradient in got.items():
        torch.testing.assert_close(gradient, wanted[name])


@pytest.mark.parametrize('use_reentrant', [True, False])
@pytest.mark.parametrize('change', KINDS)
def test_activation_checkpointing_leaves_gradients_unchanged(change, use_reentrant):
    model = build(**change).eval()
    x, target = batch()
    F.cross_entropy(model(x), target).backward()
    wanted = gradients(model)
    model.zero_grad()

    def early(x):
        return F.relu(model.norm(model.narrow(F.relu(model.stem(x)))))

    x = checkpoint(early, x.requires_grad_(), use_reentrant=use_reentrant)
    x = checkpoint(lambda x: F.relu(model.widen(x)), x, use_reentrant=use_reentrant)
    F.cross_entropy(model.head(x.mean(dim=(2, 3))), target).backward()
    got = gradients(model)
    assert got.keys() == wanted.keys()
    for name, gradient in got.items():
        torch.testing.assert_close(gradient, wanted[name], rtol=1e-5, atol=1e-7)


# --- state dicts ---


def test_the_generator_is_stored_counted_and_seen_once():
    model = build()
    dense_only = ['stem.weight', 'stem.bias', 'norm.weight', 'norm.bias', 'widen.bias', 'head.weight', 'head.bias']
    assert sorted(name for name, _ in model.named_parameters()) == sorted(
        [*dense_only, 'narrow.code', 'widen.code', 'csg.0.weight']
    )
    assert [name for name in model.state_dict() if 'csg' in name] == ['csg.0.weight', 'csg.0._extra_state']
    # First and last are what they are in the dense network.
    assert list(model.children()) == [model.stem, model.narrow, model.norm, model.widen, model.head]
    assert list(model.parameters())[-1] is model.head.bias


def test_a_binary_models_state_dict_holds_no_signs():
    model = build(generator='binary')
    assert [name for name in model.state_dict() if 'csg' in name] == ['csg.0._extra_state']
    assert model.state_dict()['csg.0._extra_state'].numel() < 200


@pytest.mark.parametrize('change', KINDS)
def test_a_state_dict_loads_into_a_twin_of_other_seeds(change):
    model = build(**change)
    train(model, steps=2)
    twin = retrofit(Net(seed=1), CSG | change | {'seed': 9})
    twin.load_state_dict(copy.deepcopy(model.state_dict()))
    for name, tensor in model.state_dict().items():
        if not name.endswith('_extra_state'):  # holds the seed too
            assert torch.equal(twin.state_dict()[name], tensor), name
    assert torch.equal(twin.csg[0].weight, model.csg[0].weight)
    x, _ = batch()
    assert torch.equal(twin.eval()(x), model.eval()(x))


OTHERS = {
    'other slice shape': {'slice_shape': (16, 16, 3, 3)},
    'transposed slice shape': {'slice_shape': (20, 12, 3, 3)},
    'other code length': {'code_dim': 25},
    'other layout': {'layout': 'flat'},
    'other generator': {'generator': 'binary'},
    'mlp': {'generator': 'mlp', 'hidden': 5},
    'tensor ring': {'generator': 'tensor_ring', 'rank': 3},
    'residual': {'residual': 1},
    'fewer layers': {'include': ['narrow']},
}


@pytest.mark.parametrize('strict', [True, False])
@pytest.mark.parametrize('prefix', ['', 'net.'])
@pytest.mark.parametrize('other', OTHERS)
def test_anothers_state_dict_is_refused_before_anything_is_copied(other, prefix, strict):
    stored = build(seed=1, **OTHERS[other])
    state_dict = {prefix + name: tensor for name, tensor in stored.state_dict().items()}
    model = build()
    kept = snapshot(model)
    root = nn.ModuleDict({'net': model}) if prefix else model
    says = "set csg to the checkpoint's|take another checkpoint"
    with pytest.raises(CSGError, match=says):
        root.load_state_dict(state_dict, strict=strict)
    assert_same_state(model, kept)


@pytest.mark.parametrize('strict', [True, False])
@pytest.mark.parametrize('lost', ['narrow.code', 'csg.0.weight', 'csg.0._extra_state'])
def test_a_state_dict_without_a_generated_entry_is_refused(lost, strict):
    model = build()
    kept = snapshot(model)
    state_dict = {name: tensor for name, tensor in build(seed=1).state_dict().items() if name != lost}
    with pytest.raises(CSGError, match=f'lacks {lost}.*take another checkpoint'):
        model.load_state_dict(state_dict, strict=strict)
    assert_same_state(model, kept)


def test_a_state_dict_of_other_layers_alone_is_refused():
    model = build()
    kept = snapshot(model)
    others = {name: each for name, each in kept.items() if not name.endswith(('code', 'weight', '_extra_state'))}
    assert others
    with pytest.raises(CSGError, match='it has other layers alone: load a whole state dict'):
        model.load_state_dict(others, strict=False)
    assert_same_state(model, kept)


def test_a_state_dict_under_other_names_is_refused():
    model = build()
    kept = snapshot(model)
    with pytest.raises(CSGError, match='no name is one of this model.*rename its tensors'):
        model.load_state_dict(
            {f'other.{name}': each for name, each in build(seed=1).state_dict().items()}, strict=False
        )
    assert_same_state(model, kept)


def test_a_deepcopy_checks_what_it_loads_against_itself():
    model = build()
    twin = copy.deepcopy(model)
    materialise(model)
    with pytest.raises(CSGError, match='take another checkpoint'):
        twin.load_state_dict({name: each for name, each in twin.state_dict().items() if name != 'narrow.code'})
    twin.load_state_dict(build(seed=1).state_dict())
    model.load_state_dict(Net().state_dict())


def test_in_place_writes_to_data_are_seen_at_once():
    # Averages of weights write through .data, which leaves no trace in autograd's version counter.
    model = build().eval()
    x, _ = batch()
    with torch.no_grad():
        before = model(x)
        model.csg[0].weight.data.mul_(2)
        doubled_generator = model(x)
        model.csg[0].weight.data.mul_(0.5)
        for _, conv in generated_convs(model):
            conv.code.data.mul_(2)
        doubled_codes = model(x)
    assert not torch.equal(before, doubled_generator)
    assert torch.equal(doubled_generator, doubled_codes)


def test_the_weight_can_be_read_and_not_set():
    model = build()
    assert isinstance(model.narrow, CSGConv) and isinstance(model.narrow, nn.Conv2d)
    weight = model.narrow.generate_weight()
    assert torch.equal(model.narrow.weight, weight)
    nn.init.zeros_(model.narrow.weight)  # start values are the generator's
    assert torch.equal(model.narrow.weight, weight)
    for other in (nn.Parameter(weight.detach()), weight, None):
        with pytest.raises(CSGError, match='before you set or prune it'):
            model.narrow.weight = other
    with pytest.raises(CSGError, match='before you set or prune it'):
        prune.l1_unstructured(model.narrow, 'weight', amount=0.5)
    with pytest.raises(CSGError, match='torch.fx cannot trace generated weights'):
        torch.fx.symbolic_trace(model)
    assert 'narrow.weight' not in model.state_dict()


def test_every_conv_shares_one_generator():
    model = retrofit(Net(), [CSG | {'include': ['narrow']}, CSG | {'include': ['widen'], 'code_dim': 9}])
    assert model.narrow.generator is model.csg[0]
    assert model.widen.generator is model.csg[1]
    shared = build()
    assert {conv.generator for _, conv in generated_convs(shared)} == {shared.csg[0]}


def test_channels_last_and_default_devices_are_no_obstacle():
    model = retrofit(Net(), CSG).eval()
    x = torch.randn(2, 3, 9, 9, generator=torch.Generator().manual_seed(0))
    expected = model(x)
    model.to(memory_format=torch.channels_last)
    torch.testing.assert_close(model(x.to(memory_format=torch.channels_last)), expected)
    with torch.device('meta'):
        again = retrofit(Net().to_empty(device='cpu'), CSG)
    assert torch.equal(dict(again.named_parameters())['csg.0.weight'], dict(model.named_parameters())['csg.0.weight'])


@pytest.mark.parametrize('strict', [True, False])
def test_codes_without_their_generator_are_refused(strict):
    model = nn.Sequential(Net())
    stored = retrofit(nn.Sequential(Net()), CSG)[0].state_dict()
    retrofit(model, CSG)
    with pytest.raises(CSGError, match='codes mean nothing without their generator'):
        model[0].load_state_dict(stored, strict=strict)
    model.load_state_dict(model.state_dict())
    with pytest.raises(CSGError, match='load the whole checkpoint'):
        model[0].load_state_dict(stored, strict=strict)
