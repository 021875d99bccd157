"""Generated weights are laid out in memory as a dense network's weights would be."""

from copy import deepcopy

import pytest
import torch
from torch import nn
from two_convs import CSG, Net, batch, build

from csg_seg import materialise, retrofit
from csg_seg.generators.slices import join
from csg_seg.layers.conv import generated_convs

LAST, FIRST = torch.channels_last, torch.contiguous_format
# Slices that cover both weights without overhang: a cropped weight is a view with gaps.
EXACT = {'slice_shape': (1, 1, 3, 3), 'code_dim': 4}
KINDS = [EXACT, EXACT | {'layout': 'flat'}, EXACT | {'residual': 2}, EXACT | {'generator': 'mlp', 'hidden': 5}]


def formats(model):
    return [
        FIRST if conv.weight.is_contiguous() else LAST if conv.weight.is_contiguous(memory_format=LAST) else None
        for _, conv in generated_convs(model)
    ]


@pytest.mark.parametrize('csg', KINDS)
def test_weights_follow_the_network_to_channels_last_and_back(csg):
    model = build(**csg)
    before = [conv.weight.detach().clone() for _, conv in generated_convs(model)]
    assert formats(model) == [FIRST] * 2
    for change in (lambda each: each.to(memory_format=LAST), lambda each: each.double(), deepcopy):
        model = change(model)
        assert formats(model) == [LAST] * 2
    for wanted, (_, conv) in zip(before, generated_convs(model), strict=True):
        torch.testing.assert_close(conv.weight.float(), wanted)
    assert formats(model.to(memory_format=FIRST)) == [FIRST] * 2


def test_a_network_that_is_in_channels_last_stays_so_when_retrofitted_and_materialised():
    model = retrofit(Net().to(memory_format=LAST), EXACT)
    assert formats(model) == [LAST] * 2
    weights = [conv.weight for conv in materialise(model).modules() if isinstance(conv, nn.Conv2d)]
    assert all(weight.is_contiguous(memory_format=LAST) and not weight.is_contiguous() for weight in weights)


@pytest.mark.parametrize('change', [{}, {'layout': 'flat'}, {'residual': 2}])
def test_outputs_equal_those_of_the_materialised_network(change):
    x, _ = batch()
    x = x.to(memory_format=LAST)
    model = build(**change).to(memory_format=LAST).eval()
    with torch.no_grad():
        outputs = [model(x), model(x)]  # generated, then cached
        wanted = materialise(model)(x)
    assert all(torch.equal(each, wanted) for each in outputs)


def test_cached_weights_are_in_the_network_s_format():
    model = build().to(memory_format=LAST).eval()
    with torch.no_grad():
        model(batch()[0])
    (cached,) = model.csg.ahead.cached.values()
    assert all(weight.is_contiguous(memory_format=LAST) for weight in cached.weights)  # cropped ones too


@pytest.mark.parametrize('layout', ['block', 'flat'])
@pytest.mark.parametrize('kernel', [(3,), (3, 3), (1, 3, 2)])
def test_the_order_of_memory_does_not_change_values(layout, kernel):
    slices = torch.randn(6, 4, 5, *kernel, generator=torch.Generator().manual_seed(0))
    shape = (7, 13, *kernel)
    wanted = join(slices, shape, layout=layout)
    got = join(slices, shape, layout=layout, channels_last=True)
    assert torch.equal(got, wanted) and got.movedim(1, -1).stride(-1) == 1


def test_transposed_and_3d_convs_follow_too():
    convs = nn.ModuleDict({'up': nn.ConvTranspose2d(24, 20, 3), 'other': nn.Conv2d(24, 20, 3)})
    retrofit(convs, CSG | {'include': ['up', 'other']}).to(memory_format=LAST)
    assert convs['up'].channels_last and convs['other'].channels_last
    volume = nn.ModuleDict({'one': nn.Conv3d(4, 4, 3)})
    retrofit(volume, {'slice_shape': (2, 2, 3, 3, 3), 'code_dim': 3, 'include': ['one']})
    volume.to(memory_format=torch.channels_last_3d)
    assert volume['one'].weight.is_contiguous(memory_format=torch.channels_last_3d)
