"""Networks that share generators hold them once and compute what they did before."""

import copy
import gc
import pickle

import pytest
import torch
from torch import nn
from two_convs import CSG, Net, batch, build

from csg_seg import (
    CSGError,
    fit,
    load_compact,
    load_generators,
    materialise,
    retrofit,
    save_compact,
    share_generators,
)
from csg_seg.layers.conv import generated_convs

KINDS = {
    'linear': {},
    'binary': {'generator': 'binary'},
    'mlp': {'generator': 'mlp', 'hidden': 5},
}


CHAIN = CSG | {'include': ['1', '2']}


def chain(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(3, 31, 3), nn.Conv2d(31, 31, 3), nn.Conv2d(31, 31, 3))


def with_other_codes(model, seed):
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, conv in generated_convs(model):
            conv.code.add_(torch.randn(conv.code.shape, generator=rng))
    return model.eval()


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('keep_weights', [True, False])
@torch.no_grad()
def test_outputs_and_state_dicts_stay_and_memory_holds_one_generator(kind, keep_weights):
    models = [with_other_codes(build(**KINDS[kind]), seed) for seed in range(3)]
    for each in models:
        each.csg.keep_weights = keep_weights
    images, _ = batch()
    wanted = [(each(images), {name: tensor.clone() for name, tensor in each.state_dict().items()}) for each in models]
    share_generators(*models)
    assert len({id(each.csg[0]) for each in models}) == 1
    assert len({id(conv.generator) for each in models for _, conv in generated_convs(each)}) == 1
    for _ in range(2):
        for each, (outputs, state_dict) in zip(models, wanted, strict=True):
            assert torch.equal(each(images), outputs)
            assert each.state_dict().keys() == state_dict.keys()
            assert all(torch.equal(tensor, state_dict[name]) for name, tensor in each.state_dict().items())


def test_networks_of_other_architectures_share_too():
    class Other(nn.Sequential):
        def __init__(self):
            torch.manual_seed(7)
            super().__init__(nn.Conv2d(3, 24, 3), nn.Conv2d(24, 12, 3))

    first, second = build(), retrofit(Other(), CSG)
    images, _ = batch()
    second.csg[0].load_state_dict(first.csg[0].state_dict(), strict=False)
    wanted = second.eval()(images)
    share_generators(first, second)
    assert second.csg[0] is first.csg[0]
    assert torch.equal(second(images), wanted)
    state_dict = second.state_dict()
    retrofit(Other(), CSG).load_state_dict(state_dict)  # the entry of settings names its own layers


def test_updates_of_a_base_are_served_with_one_generator(tmp_path):
    save_compact(build(), tmp_path / 'base.safetensors')
    wanted = []
    for seed in range(2):
        model = with_other_codes(build(), seed)
        wanted.append(model(batch()[0]))
        save_compact(model, tmp_path / f'{seed}.safetensors', base=tmp_path / 'base.safetensors')
    models = [load_compact(tmp_path / f'{seed}.safetensors', Net()).eval() for seed in range(2)]
    share_generators(*models)
    assert models[0].csg[0] is models[1].csg[0]
    for model, outputs in zip(models, wanted, strict=True):
        assert torch.equal(model(batch()[0]), outputs)


def test_other_generators_are_refused_and_nothing_changes():
    first, equal = build(), build()
    others = [retrofit(Net(), CSG | {'seed': 3}), retrofit(Net(), CSG | {'code_dim': 9}), build()]
    with torch.no_grad():
        others[2].csg[0].weight[0, 0] += 1e-3
    for other in others:
        own = equal.csg[0]
        with pytest.raises(CSGError, match='network 2 of the others has other generators'):
            share_generators(first, equal, other)
        assert equal.csg[0] is own
    with pytest.raises(CSGError, match='not retrofitted'):
        share_generators(first, Net())


@pytest.mark.parametrize(
    'change',
    [
        lambda model: model.load_state_dict(build(9).state_dict()),
        lambda model: fit(model, Net(9).state_dict()),
        lambda model: model.half(),
        lambda model: load_generators(model, build(9).state_dict()),
    ],
    ids=['load', 'fit', 'half', 'generators'],
)
def test_a_network_that_changes_takes_generators_of_its_own(change):
    first, second, third = (with_other_codes(build(), seed) for seed in range(3))
    images, _ = batch()
    wanted = [each(images) for each in (first, third)]
    share_generators(first, second, third)
    change(second)
    assert second.csg[0] is not first.csg[0] and first.csg[0] is third.csg[0]
    for model, outputs in zip((first, third), wanted, strict=True):
        assert torch.equal(model(images), outputs)
    change(first)
    assert torch.equal(third(images), wanted[1])


@pytest.mark.parametrize('is_alive', [True, False])
@pytest.mark.parametrize(
    'change',
    [
        lambda part: part.load_state_dict(retrofit(chain(9), CHAIN | {'seed': 5})[:2].state_dict()),
        lambda part: part.double(),
        lambda part: (part[:][:].double(), gc.collect()),
    ],
    ids=['load', 'double', 'double a slice of a slice'],
)
def test_a_slice_of_a_network_that_shares_leaves_the_others(change, is_alive):
    first, second = (retrofit(chain(), CHAIN) for _ in range(2))
    image = torch.ones(1, 3, 9, 9)
    expected = first(image)
    share_generators(first, second)
    part = second[:2]
    assert part.csg[0] is first.csg[0]
    if not is_alive:
        del second
        gc.collect()
        assert part.csg.whole() is None
    change(part)
    assert torch.equal(first(image), expected)
    assert part.csg[0] is not first.csg[0]
    if is_alive:
        assert second.csg[0] is part[1].generator
        second.double()(image.double())
        second.state_dict()


def test_a_slice_follows_its_network():
    first, second = (retrofit(chain(), CHAIN) for _ in range(2))
    share_generators(first, second)
    part, image = second[:2], torch.ones(1, 3, 9, 9)
    other = retrofit(chain(9), CHAIN | {'seed': 5})
    second.load_state_dict(other.state_dict())
    assert part.csg[0] is second.csg[0] and part.csg[0] is not first.csg[0]
    assert torch.equal(part(image), other[:2](image)) and not torch.equal(part(image), first[:2](image))
    copied = copy.deepcopy(part)
    copied.load_state_dict(first[:2].state_dict())
    assert torch.equal(copied(image), first[:2](image)) and torch.equal(part(image), other[:2](image))


def test_only_those_that_still_share_take_copies():
    first, second = build(), build()
    share_generators(first, second)
    own = copy.deepcopy(first).csg
    assert first.csg.is_shared and second.csg.is_shared and not own.is_shared
    kept = second.csg[0]
    first.load_state_dict(build().state_dict())
    assert first.csg[0] is not kept and not second.csg.is_shared
    second.load_state_dict(build().state_dict())
    assert second.csg[0] is kept  # which an optimizer may hold
    share_generators(second, second)
    assert not second.csg.is_shared


def test_generators_of_another_dtype_are_refused():
    with pytest.raises(CSGError, match='another dtype'):
        share_generators(build(), build().double())


def test_lists_are_refused():
    with pytest.raises(CSGError, match='share_generators: the network is an object of type list'):
        share_generators([nn.Conv2d(3, 3, 3)])


def pickled(networks):
    return pickle.loads(pickle.dumps(networks))


@pytest.mark.parametrize('change', [lambda net: net.load_state_dict(chain_of(5)), lambda net: net.half()])
@pytest.mark.parametrize('copied', [copy.deepcopy, pickled, lambda nets: copy.deepcopy(nn.ModuleList(nets))])
@torch.no_grad()
def test_networks_that_are_copied_together_share_and_leave_each_other_as_they_are(copied, change):
    networks = [retrofit(chain(), CHAIN) for _ in range(2)]
    share_generators(*networks)
    one, other = copied(networks)
    assert one.csg[0] is other.csg[0]
    images = torch.randn(1, 3, 12, 12)
    before = other(images)
    change(one)
    assert torch.equal(other(images), before)


def chain_of(seed):
    return retrofit(chain(), CHAIN | {'seed': seed}).state_dict()


def test_a_network_whose_slice_was_materialised_takes_generators_of_its_own():
    net, other = (retrofit(chain(), CHAIN) for _ in range(2))
    part = net[:2]
    share_generators(net, other)
    materialise(part)
    net.load_state_dict(net.state_dict())
    net.half()
    assert net.csg[0] is not other.csg[0] and other.csg[0].weight.dtype == torch.float32
