import itertools
import math

import pytest
import torch
from torch.func import functional_call, jacfwd, jvp

from csg_seg.errors import CSGError
from csg_seg.generators.lengths import row_length
from csg_seg.generators.registry import build_generator
from csg_seg.generators.settings import Settings

# 2 * 5 * 3 * 1 = 30 values of 4 ** 3 = 64 that the ring could make.
SMALL = {'slice_shape': (2, 5, 3, 1), 'code_dim': 6, 'generator': 'tensor_ring', 'rank': 3}
CSG = {'slice_shape': (12, 20, 3, 3), 'code_dim': 60, 'generator': 'tensor_ring', 'rank': 6}
MODES = [(4, 3), (2, 5), (6, 2), (29, 2)]


def build(csg=CSG, seed=0, **changes):
    settings = Settings.from_dict(csg | changes)
    return build_generator(settings, torch.Generator().manual_seed(seed))


def random_codes(n, code_dim, seed=0):
    return torch.randn(n, code_dim, generator=torch.Generator().manual_seed(seed))


def slow_value(generator, code, index):
    """One value: the trace of a product of one matrix from each core."""
    rank, mode, cores = generator.settings.rank, generator.settings.mode, generator.settings.cores
    coefficients = code.view(cores, -1) * generator._scale()
    digits = [index // mode**place % mode for place in reversed(range(cores))]
    product = torch.eye(rank, dtype=code.dtype)
    for core, digit in zip(coefficients, digits, strict=True):
        product = product @ sum(c * basis[:, digit] for c, basis in zip(core, generator.weight, strict=True))
    return product.trace()


@pytest.mark.parametrize(('mode', 'cores'), MODES)
def test_a_value_is_the_trace_of_its_cores_product(mode, cores):
    generator = build(SMALL, mode=mode, code_dim=2 * cores).double()
    assert generator.settings.cores == cores
    code = random_codes(3, 2 * cores).double()
    slices = generator(code)
    assert slices.shape == (3, 2, 5, 3, 1)
    for each, slice in zip(code, slices, strict=True):
        slowly = torch.stack([slow_value(generator, each, index) for index in range(30)])
        torch.testing.assert_close(slice.flatten(), slowly)


def test_it_stores_its_basis_tensors_alone():
    generator = build()
    assert generator.weight.shape == (10, 6, 4, 6)
    assert sum(p.numel() for p in generator.parameters()) == 10 * 6 * 4 * 6
    assert list(generator.state_dict()) == ['weight', '_extra_state']


@pytest.mark.parametrize(('mode', 'cores'), MODES)
def test_code_std_is_exact_in_expectation(mode, cores):
    generator = build(SMALL, mode=mode, code_dim=2 * cores).double()
    # Independent coefficients of unit variance: all that pick one basis tensor for each core.
    choices = itertools.product(torch.eye(2, dtype=torch.float64), repeat=cores)
    codes = torch.stack([torch.cat(choice) for choice in choices])
    mean_square = generator(codes).square().sum(dim=0).mean().item()
    std = generator.code_std(0.3)
    assert mean_square * std ** (2 * cores) == pytest.approx(0.09)


def test_coefficients_of_a_core_start_at_one_length():
    generator = build()
    code = generator.draw_code(50, weight_std=0.2, rng=torch.Generator().manual_seed(1))
    lengths = code.view(50, 6, 10).norm(dim=2)
    torch.testing.assert_close(lengths, torch.full((50, 6), generator.code_std(0.2) * math.sqrt(10)))


def start(seed):
    """Return a generator and a code of the layer whose pace it is tuned to."""
    generator = build(seed=seed)
    s_out, _, kh, kw = CSG['slice_shape']
    std = math.sqrt(2 / (s_out * kh * kw))
    return generator, generator.draw_code(1, weight_std=std, rng=torch.Generator().manual_seed(100 + seed)), std


def test_a_codes_entry_moves_its_slice_by_row_length():
    moved = []
    for seed in range(20):
        generator, code, _ = start(seed)
        by_entry = jacfwd(lambda code, generator=generator: generator(code).flatten())(code)
        moved.append(by_entry.square().sum(dim=0).mean().item())
    assert sum(moved) / 20 == pytest.approx(row_length(generator.settings) ** 2, rel=0.2)


def test_a_basis_entry_moves_a_slice_as_a_linear_generators_does():
    moved, rng = [], torch.Generator().manual_seed(0)
    for seed in range(60):
        generator, code, std = start(seed)
        weight = generator.weight.detach()
        direction = torch.randn(weight.shape, generator=rng)

        def slices(weight, generator=generator, code=code):
            return functional_call(generator, {'weight': weight}, (code,))

        # Along a random direction a slice moves by the sum over entries, squared and in expectation.
        moved.append(jvp(slices, (weight,), (direction,))[1].square().sum().item() / weight.numel())
    linear = build(generator='linear', rank=None)
    assert sum(moved) / 60 == pytest.approx(linear.code_std(std) ** 2, rel=0.25)


@pytest.mark.parametrize('change', [{'rank': 5}, {'mode': 7}, {'code_dim': 66}, {'slice_shape': (20, 12, 3, 3)}])
def test_anothers_state_is_refused_by_the_key_that_differs(change):
    change = change | ({'code_dim': 60} if 'mode' in change else {})
    key = next(iter(change))
    with pytest.raises(CSGError, match=f"made with {key}=.*set the config's csg to the checkpoint's"):
        build().load_state_dict(build(**change).state_dict(), strict=False)


def test_it_has_no_linear_part_to_set():
    with pytest.raises(CSGError, match="a tensor_ring generator cannot be set to a basis; use generator='linear'"):
        build().set_linear(torch.zeros(60, 2160))


def test_the_start_is_the_seeds_alone():
    torch.manual_seed(0)
    one = build(seed=5)
    torch.manual_seed(1)
    assert torch.equal(one.weight, build(seed=5).weight)
    assert not torch.equal(one.weight, build(seed=6).weight)
    assert not build(freeze_generator=True).weight.requires_grad
