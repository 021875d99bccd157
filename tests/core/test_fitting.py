import copy
import itertools

import pytest
import torch
from torch import nn
from two_convs import BEYOND, Net, assert_same_state, snapshot, train

from csg_seg import fit, fitting, materialise, retrofit
from csg_seg.errors import CSGError
from csg_seg.fitting import fit_generator, gram
from csg_seg.generators.lengths import row_length
from csg_seg.generators.linear import Generator
from csg_seg.generators.registry import KINDS, build_generator, register_generator
from csg_seg.generators.settings import Settings
from csg_seg.generators.slices import split
from csg_seg.layers.bank import find_bank
from csg_seg.layers.conv import CSGConv, generated_convs, kaiming_std

CSG = {'slice_shape': (8, 12, 3, 3), 'code_dim': 5}


def build(seed=0, **changes):
    """Weights of 17x31 and 31x17 in slices of 8x12, many of which hang over."""
    return retrofit(Net(seed), CSG | changes)


class Even(nn.Module):
    """Two generated convs that slices of 6x4 cover without a rest."""

    def __init__(self, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.stem = nn.Conv2d(3, 20, 3, padding=1)
        self.first = nn.Conv2d(20, 24, 3, padding=1)
        self.second = nn.Conv2d(24, 42, 3)
        self.head = nn.Linear(42, 4)

    def forward(self, x):
        return self.head(self.second(self.first(self.stem(x))).mean(dim=(2, 3)))


EVEN = {'slice_shape': (6, 4, 3, 3), 'code_dim': 11}


def squared_error(model, weights):
    return sum(
        (conv.generate_weight().detach().double() - weights[f'{name}.weight'].double()).square().sum().item()
        for name, conv in generated_convs(model)
    )


def stacked_slices(weights, names, slice_shape):
    return torch.cat([split(weights[f'{name}.weight'].double(), slice_shape).flatten(1) for name in names])


def truncated_svd_error(slices, weights, layout):
    """The error of the best basis if what hangs over has to be zero, over what is kept of the weights."""
    basis = torch.linalg.svd(slices, full_matrices=False).Vh[: CSG['code_dim']]
    inside = torch.cat(
        [
            split(torch.ones_like(weights[f'{name}.weight']).double(), CSG['slice_shape'], layout=layout).flatten(1)
            for name in ('narrow', 'widen')
        ]
    )
    return ((slices - slices @ basis.T @ basis) * inside).square().sum().item()


# --- how near a fit comes ---


def test_without_overhang_the_error_is_that_of_a_truncated_svd():
    weights = Even().state_dict()
    model = retrofit(Even(seed=1), EVEN)
    fit(model, weights)
    values = torch.linalg.svdvals(stacked_slices(weights, ['first', 'second'], EVEN['slice_shape']))
    assert squared_error(model, weights) == pytest.approx(values[11:].square().sum().item(), rel=1e-4)


def test_the_gram_matrix_is_that_of_the_stacked_slices():
    weights = [torch.randn(17, 31, 3, 3), torch.randn(31, 17, 3, 3)]
    settings = Settings.from_dict(CSG)
    first, second = (split(each.double(), settings.slice_shape).flatten(1) for each in weights)
    assert torch.allclose(gram(weights, settings), first.T @ first + second.T @ second)


def test_the_errors_returned_are_the_relative_ones():
    weights = Net().state_dict()
    model = build(seed=1)
    errors = fit(model, weights)
    assert list(errors) == ['narrow', 'widen']
    for name, conv in generated_convs(model):
        dense = weights[f'{name}.weight']
        assert errors[name] == pytest.approx(((conv.generate_weight() - dense).norm() / dense.norm()).item())


@pytest.mark.parametrize('layout', ['block', 'flat'])
def test_what_hangs_over_is_free(layout):
    weights = Net().state_dict()
    model = build(seed=1, layout=layout)
    fit(model, weights)
    slices = torch.cat(
        [
            split(weights[f'{name}.weight'].double(), CSG['slice_shape'], layout=layout).flatten(1)
            for name in ('narrow', 'widen')
        ]
    )
    assert squared_error(model, weights) < truncated_svd_error(slices, weights, layout)


@pytest.mark.parametrize('layout', ['block', 'flat'])
def test_weights_that_a_generator_made_are_found_again(layout):
    dense = materialise(retrofit(Net(), {**CSG, 'code_dim': 2, 'layout': layout}))
    model = retrofit(Net(seed=1), {**CSG, 'code_dim': 4, 'layout': layout, 'seed': 5})
    fit(model, dense.state_dict())
    weights = dense.state_dict()
    slices = torch.cat(
        [
            split(weights[f'{name}.weight'].double(), CSG['slice_shape'], layout=layout).flatten(1)
            for name in ('narrow', 'widen')
        ]
    )
    # Where slices hang over, alternating least squares comes near it, not to it.
    assert squared_error(model, weights) < 1e-4 * truncated_svd_error(slices, weights, layout)


def test_a_longer_code_fits_better_up_to_exactness():
    weights = Even().state_dict()
    found = []
    for code_dim in (1, 5, 20, 40):
        model = retrofit(Even(seed=1), {**EVEN, 'code_dim': code_dim})
        fit(model, weights)
        found.append(squared_error(model, weights))
    assert all(fine < coarse for coarse, fine in itertools.pairwise(found))


@pytest.mark.parametrize('change', [{'generator': 'binary'}, {'freeze_generator': True}])
def test_a_frozen_generator_stays_and_its_codes_are_least_squares(change):
    weights = Even().state_dict()
    model = retrofit(Even(seed=1), {**EVEN, **change})
    before = find_bank(model)[0].weight.clone()
    fit(model, weights)
    assert torch.equal(find_bank(model)[0].weight, before)
    slices = stacked_slices(weights, ['first'], EVEN['slice_shape'])
    code = torch.linalg.lstsq(before.double().T, slices.T).solution.T
    assert torch.allclose(model.first.code.double(), code, atol=1e-5)


def test_rows_are_as_long_as_those_of_a_new_generator():
    model = build(seed=1)
    fit(model, Net().state_dict())
    lengths = find_bank(model)[0].weight.norm(dim=1)
    assert torch.allclose(lengths, torch.full_like(lengths, row_length(Settings.from_dict(CSG))), rtol=1e-4)


def test_an_mlp_starts_from_the_linear_fit():
    weights = Net().state_dict()
    linear, mlp = build(seed=1), build(seed=1, generator='mlp', hidden=5)
    fit(linear, weights)
    fit(mlp, weights)
    assert torch.allclose(mlp.narrow.generate_weight(), linear.narrow.generate_weight(), atol=1e-6)


def test_a_frozen_mlp_is_fitted_with_its_hidden_units():
    mlp = EVEN | {'generator': 'mlp', 'hidden': 9}
    made = retrofit(Even(seed=1), mlp)
    nn.init.normal_(made.csg[0].weight, std=0.3)
    weights = materialise(copy.deepcopy(made)).state_dict()
    model = retrofit(Even(seed=2), mlp | {'freeze_generator': True})
    model.csg[0].load_state_dict(made.csg[0].state_dict())
    before = snapshot(model.csg[0])
    errors = fit(model, weights)
    assert_same_state(model.csg[0], before)
    linear = retrofit(Even(seed=2), EVEN | {'freeze_generator': True})
    linear.csg[0].weight.data.copy_(made.csg[0].weight[: EVEN['code_dim']])
    assert max(errors.values()) < 0.5 * min(fit(linear, weights).values())


def test_a_conv_in_two_places_is_fitted_and_loaded():
    def network(seed):
        torch.manual_seed(seed)
        shared = nn.Conv2d(31, 31, 3)
        return nn.Sequential(nn.Conv2d(3, 31, 3), shared, shared)

    dense, model = network(0), retrofit(network(1), CSG)
    errors = fit(model, dense.state_dict())
    alone = retrofit(network(1)[:2], CSG)
    assert errors == fit(alone, dense[:2].state_dict())
    twin = retrofit(network(2), CSG)
    twin.load_state_dict(model.state_dict())
    assert_same_state(twin, snapshot(model))
    # Its codes alone still mean nothing.
    with pytest.raises(CSGError, match='codes mean nothing without their generator'):
        twin[1].load_state_dict(model[1].state_dict())


def test_a_residual_takes_up_what_the_generator_leaves():
    weights = Net().state_dict()
    alone, corrected = build(seed=1), build(seed=1, residual=2)
    fit(alone, weights)
    fit(corrected, weights)
    left = (weights['narrow.weight'] - alone.narrow.generate_weight().detach()).flatten(1)
    tail = torch.linalg.svdvals(left)[2:].square().sum()
    now = (weights['narrow.weight'] - corrected.narrow.generate_weight().detach()).square().sum()
    assert now.item() == pytest.approx(tail.item(), rel=1e-3)


# --- gradient descent, for kinds without a linear part ---

RING = {'slice_shape': (4, 4, 3, 3), 'code_dim': 16, 'generator': 'tensor_ring', 'rank': 3}


def ring(seed, **changes):
    return build_generator(Settings.from_dict(RING | {'seed': seed} | changes), torch.Generator().manual_seed(seed))


@pytest.fixture(scope='module')
def ring_weight():
    """A weight of 40 slices that a ring made."""
    generator = ring(seed=1)
    code = generator.draw_code(40, weight_std=0.1, rng=torch.Generator().manual_seed(2))
    return generator(code).flatten(0, 1).detach()


def error_of(generator, weight, **options):
    """Fit, and return the relative error."""
    (code,) = fit_generator(generator, [weight], **options)
    assert code.shape == (40, 16) and not code.requires_grad
    made = generator(code.float()).flatten(0, 1)
    return ((made - weight).norm() / weight.norm()).item()


def test_descent_comes_nearer_with_more_steps(ring_weight, monkeypatch):
    errors = []
    for steps in (1, 30, 150):
        monkeypatch.setattr(fitting, 'STEPS', steps)
        errors.append(error_of(ring(seed=3), ring_weight))
    assert errors[0] > 1.1 * errors[1] > 1.2 * errors[2]
    assert errors[2] < 0.75


@pytest.mark.parametrize('frozen', [True, False])
def test_descent_leaves_a_kept_generator_as_it_is(ring_weight, frozen):
    generator = ring(seed=1, freeze_generator=frozen)
    kept = generator.weight.detach().clone()
    assert error_of(generator, ring_weight, keep=not frozen) < 0.6
    assert torch.equal(generator.weight, kept)
    assert generator.weight.requires_grad is not frozen


def test_descent_on_a_linear_map_comes_near_the_best_of_its_rank(ring_weight):
    @register_generator('unaware')
    class Unaware(Generator):
        def forward(self, code):
            return super().forward(code)

    slices = split(ring_weight.double(), RING['slice_shape']).flatten(1)
    lost = torch.linalg.svdvals(slices)[16:].norm() / slices.norm()
    try:
        error = error_of(ring(seed=3, generator='unaware', rank=None), ring_weight)
    finally:
        del KINDS['unaware']
    assert lost.item() * 0.999 < error < lost.item() + 0.05


def test_descent_depends_on_the_seed_and_not_on_the_state_or_the_scale(ring_weight, monkeypatch):
    monkeypatch.setattr(fitting, 'STEPS', 20)
    one, changed, other, small = ring(seed=3), ring(seed=3), ring(seed=4), ring(seed=3)
    nn.init.zeros_(changed.weight)
    torch.manual_seed(0)
    (code,) = fit_generator(one, [ring_weight])
    torch.manual_seed(1)
    (same,) = fit_generator(changed, [ring_weight])
    assert torch.equal(code, same)
    assert torch.equal(one.weight, changed.weight)
    assert not torch.equal(code, fit_generator(other, [ring_weight])[0])
    assert one.weight.grad is None
    assert error_of(small, ring_weight * 1e-4) == pytest.approx(error_of(one, ring_weight), rel=0.05)


def test_descent_refuses_weights_that_are_all_zero():
    with pytest.raises(CSGError, match='all slices are zero; leave this layer dense'):
        fit_generator(ring(seed=1), [torch.zeros(8, 8, 3, 3)])


# --- what a fit leaves as it is, and what it does not ---


@pytest.mark.parametrize('change', [{}, {'generator': 'binary'}, *BEYOND])
def test_a_fit_is_in_place_and_repeatable(change):
    weights = Net().state_dict()
    model, twin = build(seed=1, **change), build(seed=2, **change)
    parameters = [id(each) for each in model.parameters()]
    fit(model, weights)
    assert [id(each) for each in model.parameters()] == parameters
    once = snapshot(model)
    fit(model, weights)
    assert_same_state(model, once)
    fit(twin, weights)
    assert_same_state(twin, once)
    assert all(conv.loaded is None for _, conv in generated_convs(model))
    losses = train(model, steps=5)
    assert losses[-1] < losses[0]


@pytest.mark.parametrize('strict', [True, False])
def test_load_state_dict_fits_too(strict):
    weights = Net().state_dict()
    model, twin = build(seed=1), build(seed=1)
    fit(model, weights)
    twin.load_state_dict(weights, strict=strict)
    assert_same_state(twin, snapshot(model))
    assert torch.equal(model.norm.running_mean, weights['norm.running_mean'])
    assert torch.equal(model.stem.weight, weights['stem.weight'])


def test_a_deepcopy_fits_itself():
    model = build(seed=1)
    kept = snapshot(model)
    twin = copy.deepcopy(model)
    fit(twin, Net().state_dict())
    assert_same_state(model, kept)
    assert twin.narrow.generator is find_bank(twin)[0]


def test_weights_loaded_into_a_part_are_fitted_at_init():
    class Whole(nn.Module):
        def __init__(self, seed):
            super().__init__()
            self.backbone = Even(seed)
            self.head = nn.Conv2d(42, 12, 3)

    model = retrofit(Whole(1), {**EVEN, 'include': ['backbone', 'head'], 'exclude': ['backbone.stem']})
    trained = Even(seed=2).state_dict()
    model.backbone.load_state_dict(trained)
    bank = find_bank(model)
    bank.fit_loaded()
    alone = retrofit(Even(seed=1), EVEN)
    fit(alone, trained)
    assert torch.equal(model.backbone.first.code, alone.first.code)
    # The head has no weights yet: its codes are new, for a generator that is new to it.
    std = model.head.generate_weight().std().item()
    assert std == pytest.approx(kaiming_std(model.head), rel=0.25)
    after = snapshot(model)
    bank.fit_loaded()
    assert_same_state(model, after)


def test_a_new_head_may_be_missing_as_a_whole():
    model = build(seed=1)
    weights = {name: tensor for name, tensor in Net().state_dict().items() if not name.startswith('widen')}
    model.load_state_dict(weights, strict=False)
    assert model.narrow.loaded is None


def test_what_a_resumed_run_loads_at_init_is_not_fitted():
    model = build(seed=1)
    kept = snapshot(model)
    find_bank(model).loading.fit_on_load = False
    model.narrow.load_state_dict({'weight': torch.zeros(17, 31, 3, 3)})
    find_bank(model).fit_loaded()
    assert_same_state(model, kept)
    assert model.narrow.loaded is None


# --- bad input ---


def test_other_weights_are_refused_before_anything_is_copied():
    model = build(seed=1)
    kept = snapshot(model)
    good = Net().state_dict()
    nan = {**good, 'narrow.weight': good['narrow.weight'] * float('nan')}
    cases = {
        r'stem.weight holds NaN or infinite': {**good, 'stem.weight': good['stem.weight'] / 0},
        r'norm.running_var holds NaN or infinite': {
            **good,
            'norm.running_var': good['norm.running_var'] * float('nan'),
        },
        r'narrow.weight holds NaN or infinite values; take a checkpoint from before': nan,
        r'widen.weight is \(31, 17, 1, 1\), not \(31, 17, 3, 3\)': {**good, 'widen.weight': torch.ones(31, 17, 1, 1)},
        r'extra.weight \(2, 2, 3, 3\) is unexpected': {**good, 'extra.weight': torch.ones(2, 2, 3, 3)},
        r'is missing.*; its names begin with module': {f'module.{name}': each for name, each in good.items()},
        r'narrow.weight is missing; to let layers start anew, .*load_state_dict\(model, weights, reset': {
            name: each for name, each in good.items() if name != 'narrow.weight'
        },
        r'norm.weight is missing': {name: each for name, each in good.items() if name != 'norm.weight'},
        'the weights are not those of the dense network': build(seed=2).state_dict(),
    }
    for says, weights in cases.items():
        with pytest.raises(CSGError, match=says):
            fit(model, weights)
        assert_same_state(model, kept)
    with pytest.raises(CSGError, match='this str; give a state dict'):
        fit(model, 'dense.pth')
    with pytest.raises(CSGError, match="this dict; give its entry 'state_dict'"):
        fit(model, {'state_dict': good})
    with pytest.raises(CSGError, match='not retrofitted; call csg_seg.retrofit'):
        fit(Net(), good)


@pytest.mark.parametrize('strict', [True, False])
def test_another_networks_weights_are_refused_by_load_state_dict(strict):
    class Deep(nn.Module):
        def __init__(self, depth):
            super().__init__()
            self.body = nn.Sequential(*(nn.Conv2d(12, 12, 3) for _ in range(depth)))

    csg = {'slice_shape': (12, 12, 3, 3), 'code_dim': 2}
    for depth, other, says in ((3, 5, r'body.3.weight \(12, 12, 3, 3\) is not in the model'), (5, 3, 'is missing')):
        model = retrofit(Deep(depth), csg)
        kept = snapshot(model)
        with pytest.raises(CSGError, match=f"another network's: .*{says}"):
            model.load_state_dict(Deep(other).state_dict(), strict=strict)
        assert_same_state(model, kept)


def test_a_bad_weight_for_a_part_is_refused():
    model = build()
    with pytest.raises(CSGError, match='NaN'):
        model.narrow.load_state_dict({'weight': torch.full((17, 31, 3, 3), float('nan'))})
    with pytest.raises(CSGError, match=r'\(1, 1, 3, 3\) in the checkpoint'):
        model.narrow.load_state_dict({'weight': torch.ones(1, 1, 3, 3)})
    assert isinstance(model.narrow, CSGConv)
