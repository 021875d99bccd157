import pytest
import torch

from csg_seg.descent import fit_by_descent
from csg_seg.errors import CSGError
from csg_seg.generators.registry import build_generator
from csg_seg.generators.settings import Settings

CSG = {'slice_shape': (4, 4, 3, 3), 'code_dim': 16, 'generator': 'tensor_ring', 'rank': 3}
SIZE = 4 * 4 * 3 * 3


def build(seed=0, **changes):
    settings = Settings.from_dict(CSG | changes)
    return build_generator(settings, torch.Generator().manual_seed(seed))


def fit(generator, slices, *, steps=150, seed=0):
    return fit_by_descent(generator, slices, steps=steps, rng=torch.Generator().manual_seed(seed))


def relative_error(generator, code, slices):
    return ((generator(code).flatten(1) - slices).norm() / slices.norm()).item()


@pytest.fixture(scope='module')
def slices():
    """Slices of another ring, which a ring can make exactly."""
    generator = build(seed=1)
    code = generator.draw_code(40, weight_std=0.1, rng=torch.Generator().manual_seed(2))
    return generator(code).flatten(1).detach()


def test_it_comes_near_slices_that_another_ring_made(slices):
    generator = build(seed=3)
    start = generator.draw_code(40, weight_std=0.1, rng=torch.Generator().manual_seed(0))
    assert relative_error(generator, start, slices) > 1
    code = fit(generator, slices)
    assert code.shape == (40, 16)
    assert not code.requires_grad
    assert relative_error(generator, code, slices) < 0.75


def test_more_steps_come_nearer(slices):
    errors = []
    for steps in (1, 30, 150):
        generator = build(seed=3)
        errors.append(relative_error(generator, fit(generator, slices, steps=steps), slices))
    assert errors[0] > 1.1 * errors[1] > 1.2 * errors[2]


def test_a_frozen_generator_keeps_still_while_codes_come_near_its_own_slices(slices):
    generator = build(seed=1, freeze_generator=True)
    kept = generator.weight.clone()
    code = fit(generator, slices)
    assert torch.equal(generator.weight, kept)
    assert relative_error(generator, code, slices) < 0.6


@pytest.mark.parametrize(
    'change', [{'generator': 'linear', 'rank': None}, {'generator': 'mlp', 'rank': None, 'hidden': 4}]
)
def test_a_linear_map_comes_near_the_best_of_its_rank(slices, change):
    generator = build(seed=3, **change)
    lost = torch.linalg.svdvals(slices.double())[16:].norm() / slices.norm()
    assert relative_error(generator, fit(generator, slices, steps=400), slices) < lost.item() + 0.05


def test_the_rng_decides_the_outcome_and_the_scale_does_not(slices):
    torch.manual_seed(0)
    one, two, other = build(seed=3), build(seed=3), build(seed=3)
    code = fit(one, slices, steps=20)
    torch.manual_seed(1)
    assert torch.equal(code, fit(two, slices, steps=20))
    assert torch.equal(one.weight, two.weight)
    assert not torch.equal(code, fit(other, slices, steps=20, seed=1))
    assert one.weight.grad is None
    small, scaled = build(seed=3), slices * 1e-4
    error = relative_error(small, fit(small, scaled, steps=20), scaled)
    assert error == pytest.approx(relative_error(one, code, slices), rel=0.05)


def test_slices_that_do_not_fit_are_refused():
    with pytest.raises(CSGError, match=r'do not fit a generator of \(4, 4, 3, 3\); flatten them to \(n, values\)'):
        fit(build(), torch.ones(5, 4, 4, 3, 3))
    with pytest.raises(CSGError, match='all slices are zero; leave this layer dense'):
        fit(build(), torch.zeros(5, SIZE))
