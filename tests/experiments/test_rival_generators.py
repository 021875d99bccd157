"""The rival generators: laws of each paper's formula, start values, files and the table of trainings."""

import math

import pytest
import torch
from conftest import ROOT
from torch.func import jacrev
from torch.nn import functional as F
from two_convs import (
    Net,
    assert_same_state,
    assert_starts_at_kaiming_variance,
    batch,
    gradients,
    snapshot,
    train,
)

from csg_seg import load_compact, retrofit, save_compact, summarise
from csg_seg.errors import CSGError
from csg_seg.generators.lengths import row_length
from csg_seg.generators.registry import KINDS, build_generator
from csg_seg.generators.settings import Settings
from csg_seg.mm.model import build_model
from experiments.rivals import (  # noqa: F401 (they register kinds)
    filter_basis,
    hypernetwork,
    long_rows,
    manifold,
    random_basis,
)
from experiments.rivals.manifold import REFERENCE_WIDTH
from experiments.rivals.random_basis import seeded_normal
from experiments.runs.table import read_table

# Registered in these tests only: messages of other tests list all kinds.
KINDS_HERE = {
    name: KINDS.pop(name) for name in ('filter_basis', 'hypernetwork', 'long_rows', 'manifold', 'random_basis')
}

SQUARE = {'slice_shape': (12, 20, 3, 3)}
HYPERNETWORK = SQUARE | {'generator': 'hypernetwork', 'code_dim': 24, 'hidden': 17}
FILTER_BASIS = {'generator': 'filter_basis', 'slice_shape': (1, 20, 3, 3), 'code_dim': 24}
RANDOM_BASIS = SQUARE | {'generator': 'random_basis', 'code_dim': 24}
MANIFOLD = {'generator': 'manifold', 'slice_shape': (4, 8, 3, 3), 'code_dim': 9, 'hidden': 64}
ALL = [HYPERNETWORK, FILTER_BASIS, RANDOM_BASIS, MANIFOLD]
FROZEN = [RANDOM_BASIS, MANIFOLD]
every = pytest.mark.parametrize('csg', ALL, ids=lambda csg: csg['generator'])
frozen = pytest.mark.parametrize('csg', FROZEN, ids=lambda csg: csg['generator'])


@pytest.fixture(autouse=True)
def _kinds(monkeypatch):
    for name, kind in KINDS_HERE.items():
        monkeypatch.setitem(KINDS, name, kind)


def build(csg, **changes):
    return build_generator(Settings.from_dict(csg | changes), torch.Generator().manual_seed(0))


def draw(generator, n=3, std=0.1):
    return generator.draw_code(n, weight_std=std, rng=torch.Generator().manual_seed(1))


def test_a_hypernetworks_second_layer_is_shared_by_all_input_channels():
    generator, rng = build(HYPERNETWORK).double(), torch.Generator().manual_seed(2)
    torch.nn.init.normal_(generator.bias, generator=rng)
    torch.nn.init.normal_(generator.hidden_bias, generator=rng)
    code = draw(generator).double()
    for z, block in zip(code, generator(code), strict=True):
        for channel in range(20):
            a = generator.hidden_weight[channel].T @ z + generator.hidden_bias[channel, 0] / math.sqrt(24)
            values = generator.weight.T @ a + generator.bias * row_length(generator.settings) / math.sqrt(2160)
            torch.testing.assert_close(block[:, channel], values.view(12, 3, 3))


def test_a_hypernetwork_stores_what_the_paper_counts():
    # Section 3.1: N_z x blocks + d x (N_z + 1) x N_in + f x N_out x f x (d + 1).
    generator = build(HYPERNETWORK)
    assert sum(each.numel() for each in generator.parameters()) == 17 * (24 + 1) * 20 + 3 * 12 * 3 * (17 + 1)


def test_a_filter_basis_is_a_conv_with_the_basis_for_each_part_of_the_input_then_a_1x1_conv():
    torch.manual_seed(0)
    model = retrofit(torch.nn.Sequential(torch.nn.Conv2d(3, 40, 1), torch.nn.Conv2d(40, 7, 3)), FILTER_BASIS).double()
    conv, x = model[1], torch.randn(2, 40, 9, 9, dtype=torch.float64)
    basis = conv.generator.weight.view(24, 20, 3, 3)
    responses = torch.cat([F.conv2d(part, basis) for part in x.split(20, dim=1)], dim=1)
    coefficients = conv.code.view(7, 2 * 24, 1, 1)
    torch.testing.assert_close(F.conv2d(responses, coefficients) + conv.bias.view(7, 1, 1), conv(x))


def test_a_random_basis_adds_frozen_tensors():
    generator = build(RANDOM_BASIS).double()
    code = draw(generator).double()
    for each, slice in zip(code, generator(code), strict=True):
        slowly = sum(c * tensor for c, tensor in zip(each, generator.weight, strict=True))
        torch.testing.assert_close(slice.flatten(), slowly)


def test_a_point_of_the_manifold_is_an_amplitude_times_the_direction_of_a_sine_network():
    generator = build(MANIFOLD).double()
    code, size = draw(generator).double(), 4 * 8 * 9
    for each, slice in zip(code, generator(code), strict=True):
        h = torch.zeros(64, dtype=torch.float64)
        for unit in range(64):
            h[unit] = math.sin(sum(each[1:] * generator._input_scale() * generator.input_weight[:, unit]))
        g = torch.stack([sum(h * generator.hidden_weight[:, unit]).sin() for unit in range(64)])
        direction = torch.stack([sum(g * generator.weight[:, index]) for index in range(size)])
        direction /= direction.square().sum().sqrt()
        torch.testing.assert_close(slice.flatten(), each[0] * row_length(generator.settings) * direction)


@pytest.mark.parametrize(
    'csg',
    [
        *ALL,
        HYPERNETWORK | {'hidden': 70, 'slice_shape': (16, 5, 1, 1)},
        MANIFOLD | {'frequency': 3},
        MANIFOLD | {'slice_shape': (8, 8, 1, 1), 'code_dim': 6},
    ],
)
def test_its_weight_starts_at_its_layers_kaiming_variance(csg):
    assert_starts_at_kaiming_variance(csg)


@pytest.mark.parametrize('csg', [*ALL, MANIFOLD | {'frequency': 2}])
def test_an_entry_of_a_code_moves_its_slice_as_a_linear_generators_does(csg):
    generator, (*_, kh, kw) = build(csg), csg['slice_shape']
    codes = draw(generator, n=16, std=math.sqrt(2 / (REFERENCE_WIDTH * kh * kw)))
    moved = torch.stack([jacrev(lambda code: generator(code[None]).flatten())(code).square().sum(0) for code in codes])
    assert moved.mean().item() == pytest.approx(row_length(generator.settings) ** 2, rel=0.15)


def test_long_rows_begin_with_the_same_weights_and_move_them_in_other_proportions():
    x, target = batch()
    linear, long = (retrofit(Net(), SQUARE | {'code_dim': 24, 'generator': kind}) for kind in ('linear', 'long_rows'))
    torch.testing.assert_close(long.widen.weight, linear.widen.weight)
    for model in (linear, long):
        F.cross_entropy(model(x), target).backward()

    def moved(model):
        conv, generator = model.widen, model.csg[0]
        return conv.code.grad @ generator.weight.detach(), conv.code.detach() @ generator.weight.grad

    factors = (long_rows.STRETCH**2, long_rows.STRETCH**-2)
    for before, after, factor in zip(moved(linear), moved(long), factors, strict=True):
        torch.testing.assert_close(after, before * factor)


@every
def test_it_learns_and_every_parameter_has_a_gradient(csg):
    model = retrofit(Net(), csg)
    losses = train(model)
    assert losses[-1] < 0.5 * losses[0]
    assert all(gradient.abs().sum() > 0 for gradient in gradients(model).values())
    generator = model.narrow.generator
    assert len(list(generator.parameters())) == {'hypernetwork': 4, 'filter_basis': 1}.get(csg['generator'], 0)


@every
def test_a_compact_file_gives_back_the_same_network(csg, tmp_path):
    model = retrofit(Net(), csg | {'seed': 5})
    train(model, steps=3)
    save_compact(model, tmp_path / 'net')
    loaded = load_compact(tmp_path / 'net', Net(seed=1))
    assert_same_state(loaded, snapshot(model))
    model.eval(), loaded.eval()
    assert torch.equal(loaded(batch()[0]), model(batch()[0]))


@frozen
def test_frozen_values_are_stored_as_a_seed_and_rebuilt_to_the_bit(csg):
    model, other = retrofit(Net(), csg | {'seed': 5}), retrofit(Net(seed=1), csg | {'seed': 6})
    buffers = dict(model.narrow.generator.named_buffers())
    assert {'weight'} <= {*buffers}
    assert not torch.equal(other.narrow.generator.weight, buffers['weight'])
    state = model.state_dict()
    assert [name for name in state if name.startswith('csg.')] == ['csg.0._extra_state']
    other.load_state_dict(state)
    for name, values in other.narrow.generator.named_buffers():
        assert torch.equal(values, buffers[name]), name
    assert other.narrow.generator.settings.seed == 5
    emptied = retrofit(Net(), csg | {'seed': 5}).to_empty(device='cpu')
    emptied.load_state_dict(state)
    assert torch.equal(emptied.narrow.generator.weight, buffers['weight'])


def test_seeded_values_are_nearly_gaussian_and_always_the_same():
    values = seeded_normal('weight', (300, 400), seed=3).double()
    assert values.mean().item() == pytest.approx(0, abs=0.01)
    assert values.var().item() == pytest.approx(1, abs=0.02)
    assert values.pow(4).mean().item() == pytest.approx(2.9, abs=0.1)
    for other in (seeded_normal('weight', (300, 400), seed=4), seeded_normal('hidden', (300, 400), seed=3)):
        assert (values * other).mean().item() == pytest.approx(0, abs=0.01)
    # The sums of bytes, pinned: files hold only the seed.
    sums = seeded_normal('weight', (4,), seed=3) * math.sqrt(65535) + 1530
    assert sums.round().tolist() == [1881, 1187, 1786, 1096]


def test_bad_settings_are_refused_with_a_remedy():
    with pytest.raises(CSGError, match=r'such as slice_shape=\(1, 20, 3, 3\); got 12'):
        build(FILTER_BASIS | SQUARE)
    with pytest.raises(CSGError, match='an amplitude and inputs, so at least 2 values; got 1'):
        build(MANIFOLD, code_dim=1)
    with pytest.raises(CSGError, match='a random_basis generator cannot be trained'):
        build(RANDOM_BASIS, freeze_generator=False)


STORED = {
    't-basis-10x': 1_356_406,
    'hypernetwork-10x': 1_359_558,
    'filter-basis-10x': 1_368_214,
    'random-basis-10x': 1_367_458,
    'mcnc-10x': 1_361_526,
    't-basis-47x': 298_390,
    'hypernetwork-47x': 300_026,
    'filter-basis-47x': 304_310,
    'random-basis-47x': 302_642,
    'mcnc-47x': 299_078,
}


def summarise_on_meta(cell):
    with torch.device('meta'):
        return summarise(build_model(cell.read_config()))


def test_the_cells_of_the_table_store_as_much_as_the_linear_generator():
    linear = read_table(ROOT / 'experiments' / 'runs' / 'tables' / 'camvid.yml')
    table = read_table(ROOT / 'experiments' / 'rivals' / 'tables' / 'camvid_generators.yml')
    assert (table.dataset, table.metric) == (linear.dataset, linear.metric)
    dense, *rivals = table.cells
    assert dense == linear.find('dense-s0')[0]
    assert [each.name for each in rivals] == [*STORED]
    twins = {size: linear.find(f'csg-{size}-s0')[0] for size in ('10x', '47x')}
    sizes = {size: summarise_on_meta(cell) for size, cell in twins.items()}
    for cell in rivals:
        size = cell.name.rpartition('-')[2]
        for key in ('network', 'size', 'config', 'epochs', 'amp'):
            assert getattr(cell, key) == getattr(twins[size], key)
        stored, wanted = summarise_on_meta(cell), sizes[size]
        assert stored.stored_params == STORED[cell.name]
        assert stored.stored_params == pytest.approx(wanted.stored_params, rel=0.03)
        assert {each.name for each in stored.layers if each.generator is not None} == {
            each.name for each in wanted.layers if each.generator is not None
        }
