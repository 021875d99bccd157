"""State dicts that do not fit are refused, whoever loads them; layers that may differ start anew."""

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.runner import checkpoint as of_mmengine
from torch import nn
from torch.func import functional_call

import csg_seg.mm  # noqa: F401 (has mmengine refuse codes for dense models)
from csg_seg import CSGError, fit, load_compact, load_generators, load_state_dict, materialise, retrofit, save_compact
from csg_seg.generators.signature import encode_signature, read_layers
from csg_seg.layers.bank import find_bank
from csg_seg.layers.conv import kaiming_std

CSG = {'slice_shape': (16, 16, 3, 3), 'code_dim': 12}
POINT = {'slice_shape': (16, 16, 1, 1), 'code_dim': 6}
KINDS = {
    'linear': CSG,
    'flat': CSG | {'layout': 'flat'},
    'binary': CSG | {'generator': 'binary'},
    'mlp': CSG | {'generator': 'mlp', 'hidden': 3},
    'residual': CSG | {'residual': 1},
}
EARLIER = Path(__file__).parents[1] / 'data'


def by_torch(model, weights):
    model.load_state_dict(weights)


def by_torch_in_part(model, weights):
    model.load_state_dict(weights, strict=False)


def load_by_mmengine(model, weights):
    of_mmengine.load_state_dict(model, weights)


def within_a_wrapper(model, weights):
    nn.ModuleDict({'module': model}).load_state_dict({f'module.{name}': each for name, each in weights.items()})


LOADERS = [by_torch, by_torch_in_part, within_a_wrapper, load_by_mmengine, load_state_dict]


def network(width=32, classes=5, channels=3, seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(channels, width, 3, bias=False),
        nn.ReLU(),
        nn.Conv2d(width, width, 3, bias=False),
        nn.ReLU(),
        nn.Conv2d(width, classes, 3, bias=False),
    )


ALL = {'include': ['0', '2', '4']}


# --- other widths, of which the codes are as many ---


@pytest.mark.parametrize('load', LOADERS)
@pytest.mark.parametrize('csg', KINDS.values(), ids=KINDS)
@pytest.mark.parametrize(
    ('old', 'new', 'layer'),
    [
        ({'classes': 5}, {'classes': 7}, '4'),
        ({'channels': 3}, {'channels': 4}, '0'),
        ({'width': 32}, {'width': 28}, '0'),
        ({'width': 20}, {'width': 17}, '0'),
    ],
)
def test_a_network_of_other_widths_is_refused(old, new, layer, csg, load):
    trained, model = retrofit(network(**old), csg | ALL), retrofit(network(**new), csg | ALL)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(
        CSGError, match=rf'^(module\.)?{layer}(\.residual_out|\.residual_in)?: the checkpoint holds .*this model wants'
    ):
        load(model, trained.state_dict())
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])


def test_both_shapes_are_named():
    trained, model = (retrofit(network(classes=classes), CSG | ALL) for classes in (21, 19))
    says = r'4: the checkpoint holds a weight of \(21, 32, 3, 3\), this model wants \(19, 32, 3, 3\)'
    with pytest.raises(CSGError, match=says):
        model.load_state_dict(trained.state_dict())


@pytest.mark.parametrize('load', LOADERS)
def test_a_point_classifier_of_other_classes_is_refused(load):
    def build(classes):
        net = nn.Sequential(nn.Conv2d(3, 32, 3), nn.Conv2d(32, 32, 3), nn.Conv2d(32, classes, 1, bias=False))
        return retrofit(net, [CSG, POINT])

    with pytest.raises(CSGError, match=r'2: the checkpoint holds a weight of \(21, 32, 1, 1\)'):
        load(build(19), build(21).state_dict())


@pytest.mark.parametrize('kind', [nn.ConvTranspose2d, nn.Conv1d, nn.Conv3d])
def test_kernels_of_other_kinds_are_told_apart_too(kind):
    dims = {nn.Conv1d: 1, nn.Conv3d: 3}.get(kind, 2)
    csg = {'slice_shape': (16, 16, *[3] * dims), 'code_dim': 8, 'include': ['0']}
    one, other = (retrofit(nn.Sequential(kind(20, classes, 3, bias=False)), csg) for classes in (18, 19))
    with pytest.raises(CSGError, match='the checkpoint holds a weight of'):
        other.load_state_dict(one.state_dict())


def test_a_layer_is_not_read_with_another_generator_of_the_same_settings():
    first, second = CSG | {'include': ['2']}, CSG | {'include': ['4']}
    trained, model = retrofit(network(), [first, second]), retrofit(network(), [second, first])
    with pytest.raises(CSGError, match='2: generator 0 feeds it in the checkpoint and another one in this model'):
        model.load_state_dict(trained.state_dict(), strict=False)


def test_renamed_entries_load():
    """As where a network becomes a part of another and its checkpoint follows."""
    trained = retrofit(nn.Sequential(network(), nn.ReLU()), CSG)
    model = retrofit(nn.Sequential(nn.ReLU(), network(seed=1)), CSG | {'include': ['1.2', '1.4']})
    renamed = {f'1{name[1:]}' if name.startswith('0') else name: each for name, each in trained.state_dict().items()}
    model.load_state_dict(renamed)
    images = torch.rand(1, 3, 9, 9)
    torch.testing.assert_close(model[1](images), trained[0](images))


def test_renamed_entries_of_other_widths_are_refused():
    trained = retrofit(nn.ModuleDict({'a': network(width=20)}), CSG | {'include': ['a.2']})
    model = retrofit(nn.ModuleDict({'b': network(width=24)}), CSG | {'include': ['b.2']})
    renamed = {f'b{name[1:]}' if name.startswith('a') else name: each for name, each in trained.state_dict().items()}
    codes = {name: each for name, each in renamed.items() if 'b.2' in name or 'csg' in name}
    with pytest.raises(CSGError, match='b.2: the checkpoint tells of no layer of this name'):
        model.load_state_dict(codes, strict=False)


@pytest.mark.parametrize('load', LOADERS)
def test_a_dense_head_of_other_classes_is_refused_too(load):
    def build(classes):
        return retrofit(network().append(nn.Conv2d(5, classes, 1)), CSG | {'exclude': ['5']})

    with pytest.raises(CSGError, match='5.weight: the checkpoint holds .* name the layer in reset'):
        load(build(7), build(9).state_dict())
    assert load_state_dict(build(7), build(9).state_dict(), reset='5') == ('5',)


def test_a_part_that_was_not_fitted_is_not_saved(tmp_path):
    model = retrofit(nn.ModuleDict({'body': network()}), CSG | {'include': ['body.2', 'body.4']})
    model['body'].load_state_dict(network(seed=1).state_dict())
    for save in (model.state_dict, lambda: save_compact(model, tmp_path / 'never.safetensors')):
        with pytest.raises(CSGError, match='not fitted yet'):
            save()
    find_bank(model).fit_loaded()
    assert 'body.2.code' in model.state_dict()


def test_a_state_dict_names_its_layers():
    model = retrofit(network(), [CSG | {'include': ['2']}, CSG])
    state = model.state_dict()
    assert read_layers(state['csg.0._extra_state']) == {'2': (32, 32, 3, 3)}
    assert read_layers(state['csg.1._extra_state']) == {'4': (5, 32, 3, 3)}
    del model[1]
    assert read_layers(model.state_dict()['csg.0._extra_state']) == {'1': (32, 32, 3, 3)}


# --- more generated layers than the model has ---


@pytest.mark.parametrize('load', LOADERS)
@pytest.mark.parametrize(
    ('trained', 'model'),
    [
        (CSG, CSG | {'exclude': '4'}),
        (CSG, CSG | {'include': ['2']}),
        (CSG | {'include': ['0', '2', '4']}, CSG),
        ([CSG | {'include': ['2']}, CSG], CSG | {'include': ['2']}),
        ([CSG | {'include': ['2']}, CSG | {'generator': 'binary'}], CSG | {'include': ['2']}),
    ],
)
def test_layers_that_are_dense_in_the_model_are_not_left_random(trained, model, load):
    weights = retrofit(network(), trained).state_dict()
    with pytest.raises(CSGError, match="is generated in the checkpoint and dense in this model; set the config's csg"):
        load(retrofit(network(seed=1), model), weights)


@pytest.mark.parametrize('load', LOADERS)
def test_layers_of_a_generator_that_the_model_lacks_are_refused(load):
    trained = retrofit(network(), [CSG | {'include': ['2']}, CSG | {'include': ['4']}])
    with pytest.raises(CSGError, match='4: generator 1 feeds it in the checkpoint and another one in this model'):
        load(retrofit(network(seed=1), CSG), trained.state_dict())
    earlier_ones = trained.state_dict()
    for name in [name for name in earlier_ones if name.endswith('_extra_state')]:
        earlier_ones[name] = encode_signature(trained.csg[0].settings, None)
    with pytest.raises(CSGError, match='the checkpoint holds 2 generators, this model has 1'):
        load(retrofit(network(seed=1), CSG), earlier_ones)


def test_a_part_that_the_model_lacks_may_be_missing_as_in_dense_networks():
    trained = retrofit(
        nn.ModuleDict({'body': network(), 'auxiliary': network()}), CSG | {'exclude': ['body.0', 'auxiliary.0']}
    )
    model = retrofit(nn.ModuleDict({'body': network(seed=1)}), CSG | {'exclude': ['body.0']})
    missing, unexpected = model.load_state_dict(trained.state_dict(), strict=False)
    assert not missing and all(name.startswith('auxiliary') for name in unexpected)
    assert torch.equal(model['body'][2].weight, trained['body'][2].weight)


def test_a_dense_model_takes_no_codes_from_mmengine():
    with pytest.raises(CSGError, match='holds codes and a generator .* but the config is dense'):
        load_by_mmengine(network(), retrofit(network(), CSG).state_dict())


def test_codes_of_a_part_are_not_left_to_a_dense_one():
    weights = {f'backbone.{name}': each for name, each in retrofit(network(), CSG).state_dict().items()}
    part = {name.removeprefix('backbone.'): each for name, each in weights.items() if 'csg' not in name}
    with pytest.raises(CSGError, match='2.code, and this layer is dense in the model'):
        load_by_mmengine(network(), part)


def test_a_dense_network_with_parts_of_such_names_loads():
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.csg, self.mycsg = nn.ModuleList([nn.Linear(2, 2)]), nn.ModuleList([nn.Linear(2, 2)])
            self.code = nn.Parameter(torch.zeros(2))

    model, weights = Named(), {name: torch.ones_like(each) for name, each in Named().state_dict().items()}
    load_by_mmengine(model, weights)
    assert model.csg[0].weight.all() and model.code.all()


# --- state dicts that were cast or averaged as a whole ---


def averaged_by_numpy(one, other):
    return {
        name: torch.from_numpy(np.average([each.numpy(), other[name].numpy()], axis=0, weights=[0.3, 0.7]))
        for name, each in one.items()
    }


def federated(one, other):
    """As FedAvg is usually written: weighted by samples, summed in place, divided at the end."""
    total = {name: each.clone() for name, each in one.items()}
    for name in total:
        total[name] += other[name]
        total[name] += other[name]
        total[name] = torch.div(total[name], 3)
    return total


def by_samples(one, other):
    """As frameworks of federated learning aggregate arrays."""
    samples = (100, 250, 650)
    arrays = [
        [each.numpy() * count for each in state.values()]
        for state, count in zip((one, other, one), samples, strict=True)
    ]
    return {
        name: torch.tensor(sum(each) / sum(samples)) for name, each in zip(one, zip(*arrays, strict=True), strict=True)
    }


CASTS = {
    'federated': federated,
    'by samples': by_samples,
    'integer weights': lambda one, other: {name: (each * 1 + other[name] * 5) / 6 for name, each in one.items()},
    'half': lambda one, other: {name: each.half() for name, each in one.items()},
    'bfloat16': lambda one, other: {name: each.bfloat16() for name, each in one.items()},
    'double': lambda one, other: {name: each.double() for name, each in one.items()},
    'integers too': lambda one, other: {
        name: each.long() if name.endswith('_extra_state') else each for name, each in one.items()
    },
    'mean': lambda one, other: {
        name: (each.double() + other[name].double()).div(2).float() for name, each in one.items()
    },
    'mean of three': lambda one, other: {
        name: torch.stack([each.float(), other[name].float(), each.float()]).mean(0) for name, each in one.items()
    },
    'weighted': lambda one, other: {name: each * (1 / 3) + other[name] * (2 / 3) for name, each in one.items()},
    'numpy': averaged_by_numpy,
    'moving average': lambda one, other: {
        name: each.float() * 0.999 + other[name].float() * 0.001 for name, each in one.items()
    },
}


@pytest.mark.parametrize('cast', CASTS.values(), ids=CASTS)
@pytest.mark.parametrize('csg', KINDS.values(), ids=KINDS)
def test_what_was_cast_or_averaged_as_a_whole_loads(csg, cast):
    model = retrofit(network(), csg)
    weights = cast(model.state_dict(), retrofit(network(), csg).state_dict())
    again = retrofit(network(seed=3), csg)
    again.load_state_dict(weights)
    torch.testing.assert_close(again[2].weight, model[2].weight, rtol=0.02, atol=0.02)


def test_an_average_of_different_settings_is_refused():
    states = [retrofit(network(), CSG | {'layout': layout}).state_dict() for layout in ('block', 'flat')]
    size = len(states[1]['csg.0._extra_state'])
    states[0]['csg.0._extra_state'] = states[0]['csg.0._extra_state'][:size]
    mean = {name: (each.double() + states[1][name].double()) / 2 for name, each in states[0].items()}
    with pytest.raises(CSGError, match='settings are damaged'):
        retrofit(network(), CSG).load_state_dict(mean)


def test_an_average_of_other_signs_is_refused():
    states = [retrofit(network(), CSG | {'generator': 'binary', 'seed': seed}).state_dict() for seed in (0, 4)]
    mean = {name: (each.double() + states[1][name].double()) / 2 for name, each in states[0].items()}
    with pytest.raises(CSGError, match='damaged, or it is an average of networks with different settings'):
        retrofit(network(), CSG | {'generator': 'binary'}).load_state_dict(mean)


@pytest.mark.parametrize('value', [float('nan'), float('inf'), 300.0, -1.0])
def test_damaged_settings_are_refused(value):
    weights = retrofit(network(), CSG).state_dict()
    weights['csg.0._extra_state'] = weights['csg.0._extra_state'].float()
    weights['csg.0._extra_state'][3] = value
    with pytest.raises(CSGError, match='settings are damaged'):
        retrofit(network(), CSG).load_state_dict(weights)


# --- files of earlier versions ---


def earlier():
    return torch.load(EARLIER / 'state_0.1.0.pth', weights_only=True)


def earlier_network():
    return nn.Sequential(
        *(nn.Conv2d(3, 12, 3), nn.BatchNorm2d(12), nn.ReLU(), nn.Conv2d(12, 20, 3), nn.ReLU()),
        *(nn.ConvTranspose2d(20, 10, 3), nn.ReLU(), nn.Conv2d(10, 9, 1), nn.Conv2d(9, 5, 1)),
    )


def test_a_state_dict_of_an_earlier_version_gives_the_outputs_it_gave():
    file = earlier()
    model = retrofit(earlier_network(), file['csg']).eval()
    model.load_state_dict(file['state_dict'])
    torch.testing.assert_close(model(file['image']), file['outputs'])


def test_a_compact_file_of_version_3_gives_the_outputs_it_gave():
    file = earlier()
    for model in (earlier_network(), retrofit(earlier_network(), file['csg'])):
        load_compact(EARLIER / 'compact_version3.safetensors', model).eval()
        torch.testing.assert_close(model(file['image']), file['outputs'])


def test_an_earlier_state_dict_is_still_told_from_a_wrong_one():
    file = earlier()
    net = earlier_network()
    net[8] = nn.Conv2d(9, 40, 1)  # of more codes
    with pytest.raises(CSGError, match='8.code: the checkpoint holds'):
        retrofit(net, file['csg']).load_state_dict(file['state_dict'])
    fewer = [*file['csg'][:2], file['csg'][2] | {'exclude': ['8']}]
    with pytest.raises(CSGError, match='8 is generated in the checkpoint and dense'):
        retrofit(earlier_network(), fewer).load_state_dict(file['state_dict'], strict=False)


# --- layers that may start anew ---


def saved(tmp_path, model):
    save_compact(model, tmp_path / 'trained.safetensors')
    return tmp_path / 'trained.safetensors'


@pytest.mark.parametrize('csg', KINDS.values(), ids=KINDS)
@pytest.mark.parametrize('classes', [7, 40])
def test_a_head_for_other_classes_starts_anew(csg, classes, tmp_path):
    trained = retrofit(network(), csg)
    model = retrofit(network(classes=classes, seed=1), csg)
    assert load_state_dict(model, trained.state_dict(), reset='4') == ('4',)
    assert torch.equal(model[:3](torch.ones(1, 3, 9, 9)), trained[:3](torch.ones(1, 3, 9, 9)))
    assert model[4].weight.std().item() == pytest.approx(kaiming_std(model[4]), rel=0.35)
    path = saved(tmp_path, trained)
    for other in (network(classes=classes, seed=1), retrofit(network(classes=classes, seed=1), csg)):
        loaded = load_compact(path, other, reset=['4'])
        assert find_bank(loaded).reset.layers == ('4',)
        assert torch.equal(loaded[2].weight, trained[2].weight) and len(loaded[4].weight) == classes
        save_compact(loaded, tmp_path / 'whole again.safetensors')
        load_compact(tmp_path / 'whole again.safetensors', network(classes=classes))


def test_its_codes_are_drawn_for_the_generator_that_was_loaded():
    trained = retrofit(network(), CSG)
    with torch.no_grad():
        trained.csg[0].weight.mul_(10)
    model = retrofit(network(classes=7), CSG)
    load_state_dict(model, trained.state_dict(), reset='4')
    assert model[4].weight.std().item() == pytest.approx(kaiming_std(model[4]), rel=0.35)


def test_a_layer_that_fits_is_loaded_though_it_might_start_anew():
    trained, model = retrofit(network(), CSG), retrofit(network(seed=1), CSG)
    assert load_state_dict(model, trained.state_dict(), reset=['2', '4']) == ()
    assert torch.equal(model[4].weight, trained[4].weight)


def test_what_is_missing_or_dense_starts_anew():
    trained, model = retrofit(network(), CSG | {'exclude': ['4']}), retrofit(network(seed=1), CSG)
    assert load_state_dict(model, trained.state_dict(), reset='4') == ('4',)
    without = {name: each for name, each in retrofit(network(), CSG).state_dict().items() if not name.startswith('4')}
    assert load_state_dict(retrofit(network(), CSG), without, reset='4') == ('4',)
    dense_head = retrofit(network(seed=1), CSG | {'exclude': ['4']})
    kept = dense_head[4].weight.clone()
    assert load_state_dict(dense_head, retrofit(network(), CSG).state_dict(), reset='4') == ('4',)
    assert torch.equal(dense_head[4].weight, kept)


def test_a_layer_of_another_generator_starts_anew():
    trained = retrofit(network(), [CSG | {'include': ['2']}, CSG | {'include': ['0', '4']}])
    model = retrofit(network(seed=1), [CSG | {'include': ['2', '4']}, CSG | {'include': ['0']}])
    assert load_state_dict(model, trained.state_dict(), reset='4') == ('4',)
    assert torch.equal(model[0].weight, trained[0].weight)


def test_a_dense_checkpoint_may_have_other_classes_too():
    dense, model = network(), retrofit(network(classes=7, seed=1), CSG)
    assert load_state_dict(model, dense.state_dict(), reset='4') == ('4',)
    assert torch.equal(model[0].weight, dense[0].weight)
    fitted = retrofit(network(), CSG | {'exclude': ['4']})
    fitted.load_state_dict(dense.state_dict())
    torch.testing.assert_close(model[2].weight, fitted[2].weight)


def test_a_whole_part_starts_anew_by_one_pattern():
    def build(classes):
        head = nn.Sequential(nn.Conv2d(32, 32, 3), nn.BatchNorm2d(32), nn.Conv2d(32, classes, 3))
        return retrofit(nn.ModuleDict({'body': network(), 'head': head}), CSG | {'exclude': ['body.0']})

    assert load_state_dict(build(4), build(9).state_dict(), reset=['head']) == ('head.2',)


def test_what_is_not_named_is_as_strict_as_ever(tmp_path):
    trained, model = retrofit(network(width=32), CSG), retrofit(network(width=20, classes=7), CSG)
    with pytest.raises(CSGError, match='the checkpoint holds|do not fit'):
        load_state_dict(model, trained.state_dict(), reset='4')
    with pytest.raises(CSGError, match="reset pattern 'head' names no layer.*look like '4'"):
        load_state_dict(model, trained.state_dict(), reset='head')
    dense = network(classes=7)
    before = dense.state_dict()
    for reset in ((), '2', 'head'):
        with pytest.raises(CSGError):
            load_compact(saved(tmp_path, trained), dense, reset=reset)
        assert dense.state_dict().keys() == before.keys()
    with pytest.raises(CSGError, match='not retrofitted'):
        load_state_dict(network(), trained.state_dict())


def test_the_next_load_is_strict_again():
    trained, model = retrofit(network(), CSG), retrofit(network(classes=7), CSG)
    load_state_dict(model, trained.state_dict(), reset='4')
    with pytest.raises(CSGError, match='name the layer in reset'):
        model.load_state_dict(trained.state_dict())


# --- the meta device ---


def on_meta(csg=None):
    with torch.device('meta'):
        return network() if csg is None else retrofit(network(), csg)


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16', 'int8'])
@pytest.mark.parametrize('csg', KINDS.values(), ids=KINDS)
def test_a_network_without_values_gets_the_files(csg, dtype, tmp_path):
    trained = retrofit(network(), csg)
    save_compact(trained, tmp_path / 'trained.safetensors', dtype=dtype)
    expected = load_compact(tmp_path / 'trained.safetensors', network())
    for model in (on_meta(), on_meta(csg)):
        loaded = load_compact(tmp_path / 'trained.safetensors', model)
        assert {each.device.type for each in (*loaded.parameters(), *loaded.buffers())} == {'cpu'}
        assert {each.dtype for each in loaded.parameters()} == {torch.float32}
        assert torch.equal(loaded(torch.ones(1, 3, 9, 9)), expected(torch.ones(1, 3, 9, 9)))
        loaded(torch.ones(1, 3, 9, 9)).sum().backward()
        assert loaded[2].code.grad is not None and loaded[2].generator is loaded.csg[0]
        torch.testing.assert_close(materialise(loaded)(torch.ones(1, 3, 9, 9)), expected(torch.ones(1, 3, 9, 9)))


@pytest.mark.parametrize('csg', KINDS.values(), ids=KINDS)
def test_torchs_own_ways_from_the_meta_device_work(csg):
    trained, images = retrofit(network(), csg), torch.ones(1, 3, 9, 9)
    for model, options in ((on_meta(csg), {'assign': True}), (on_meta(csg).to_empty(device='cpu'), {})):
        model.load_state_dict(trained.state_dict(), **options)
        assert torch.equal(model(images), trained(images))


def test_tied_weights_stay_tied(tmp_path):
    def build():
        net = network()
        net.extend([nn.Conv2d(5, 5, 1), nn.Conv2d(5, 5, 1)])
        net[6].weight = net[5].weight
        return net

    save_compact(retrofit(build(), CSG), tmp_path / 'tied.safetensors')
    with torch.device('meta'):
        model = build()
    loaded = load_compact(tmp_path / 'tied.safetensors', model)
    assert loaded[6].weight is loaded[5].weight and not loaded[6].weight.is_meta


def test_what_the_file_does_not_hold_is_named(tmp_path):
    def build():
        net = network()
        net.register_buffer('mask', torch.ones(3), persistent=False)
        return net

    save_compact(retrofit(build(), CSG), tmp_path / 'masked.safetensors')
    with torch.device('meta'):
        model = build()
    with pytest.raises(CSGError, match='mask: on the meta device, and the file holds no value'):
        load_compact(tmp_path / 'masked.safetensors', model)
    assert find_bank(model) is None


def test_nothing_is_computed_from_no_values():
    model = on_meta(CSG)
    with pytest.raises(CSGError, match='fit: .* on the meta device and has no values'):
        fit(model, network().state_dict())
    with pytest.raises(CSGError, match='load_generators: .* on the meta device'):
        load_generators(model, retrofit(network(), CSG).state_dict())
    with pytest.raises(CSGError, match='meta device'):
        save_compact(model, 'never.safetensors')


def test_functional_calls_find_generators_by_name():
    model = retrofit(network(), CSG)
    parameters = {name: each * 0 for name, each in model.named_parameters()}
    assert not functional_call(model, parameters, (torch.ones(1, 3, 9, 9),)).any()


# --- what profilers leave ---


def test_counts_that_a_profiler_leaves_are_not_kept(tmp_path):
    model = retrofit(network(), CSG)
    for module in model.modules():  # as thop.profile does
        module.register_buffer('total_ops', torch.zeros(1, dtype=torch.float64))
        module.register_buffer('total_params', torch.zeros(1, dtype=torch.float64))
    save_compact(model, tmp_path / 'profiled.safetensors')
    for other in (network(), retrofit(network(seed=1), CSG), model):
        load_compact(tmp_path / 'profiled.safetensors', other)
        assert torch.equal(other[2].weight, model[2].weight)
