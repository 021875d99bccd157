import copy
import math

import pytest
import torch

from csg_seg.errors import CSGError
from csg_seg.generators.registry import build_generator
from csg_seg.generators.settings import Settings

CSG = {'slice_shape': (12, 20, 3, 3), 'code_dim': 7, 'generator': 'mlp', 'hidden': 5}
SIZE = 12 * 20 * 3 * 3


def build(seed=0, **changes):
    settings = Settings.from_dict(CSG | changes)
    return build_generator(settings, torch.Generator().manual_seed(seed))


def trained(seed=0):
    """Return a generator whose every value has left its start."""
    generator, rng = build(seed), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in generator.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=rng))
    return generator


def random_codes(n, code_dim=7, seed=0):
    return torch.randn(n, code_dim, generator=torch.Generator().manual_seed(seed))


def test_a_slice_is_its_code_and_hidden_units_times_the_generator():
    generator = trained()
    code = random_codes(4)
    for each, slice in zip(code, generator(code), strict=True):
        units = [
            max(sum(each[i] * generator.hidden_weight[i, j] for i in range(7)) + generator.hidden_bias[j], 0.0)
            for j in range(5)
        ]
        slowly = sum(value * row for value, row in zip([*each, *units], generator.weight, strict=True))
        torch.testing.assert_close(slice, slowly.view(12, 20, 3, 3), rtol=1e-4, atol=1e-4)


def test_it_stores_its_rows_and_its_hidden_layer():
    assert sum(p.numel() for p in build().parameters()) == (7 + 5) * SIZE + 7 * 5 + 5
    assert list(build().state_dict()) == ['weight', 'hidden_weight', 'hidden_bias', '_extra_state']


def test_it_starts_as_the_linear_generator_of_its_seed():
    linear = build(generator='linear', hidden=None)
    generator = build()
    code = random_codes(4)
    assert torch.equal(generator.weight[:7], linear.weight)
    torch.testing.assert_close(generator(code), linear(code))
    assert generator.code_std(0.1) == pytest.approx(linear.code_std(0.1))


@pytest.mark.parametrize('hidden', [1, 5, 40])
def test_hidden_units_start_at_the_pace_of_codes(hidden):
    generator = build(code_dim=400, hidden=hidden)
    units = torch.relu(random_codes(20_000, 400) @ generator.hidden_weight.detach())
    largest = torch.linalg.eigvalsh(units.T @ units / len(units))[-1].item()
    assert largest == pytest.approx(1, rel=0.1)


def test_its_hidden_layer_learns():
    generator = build()
    target = random_codes(30, SIZE)
    optimizer = torch.optim.SGD(generator.parameters(), lr=0.01)
    for _ in range(2):
        optimizer.zero_grad()
        (generator(random_codes(30)).flatten(1) - target).square().sum(dim=1).mean().backward()
        optimizer.step()
    assert all((parameter.grad != 0).any() for parameter in generator.parameters())


def test_set_linear_leaves_no_trace_of_the_hidden_units():
    generator = trained()
    kept = copy.deepcopy(generator)
    basis = random_codes(7, SIZE)
    generator.set_linear(basis)
    code = random_codes(4)
    torch.testing.assert_close(generator(code).flatten(1), code @ basis)
    assert torch.equal(generator.weight[7:], torch.zeros(5, SIZE))
    assert torch.equal(generator.hidden_weight, kept.hidden_weight)
    assert generator.weight.requires_grad
    with pytest.raises(CSGError, match=r'this generator needs a basis of shape \(7, 2160\), got \(12, 2160\)'):
        generator.set_linear(torch.zeros(12, SIZE))


def test_a_frozen_one_trains_nothing():
    assert not any(parameter.requires_grad for parameter in build(freeze_generator=True).parameters())


@pytest.mark.parametrize('change', [{'hidden': 6}, {'code_dim': 8}, {'generator': 'linear', 'hidden': None}])
def test_anothers_state_is_refused_by_the_key_that_differs(change):
    key = next(iter(change))
    with pytest.raises(CSGError, match=f"made with {key}=.*set csg to the checkpoint's"):
        build().load_state_dict(build(**change).state_dict(), strict=False)


def test_the_start_is_the_seeds_alone():
    torch.manual_seed(0)
    one = build(seed=5)
    torch.manual_seed(1)
    same, other = build(seed=5), build(seed=6)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), same.parameters(), strict=True))
    assert not torch.equal(one.hidden_weight, other.hidden_weight)
    assert math.isfinite(one.code_std(1.0))
