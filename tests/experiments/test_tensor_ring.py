import itertools
import json
import math

import pytest
import torch
from conftest import ROOT
from mmengine.config import Config
from torch import nn
from torch.func import functional_call, jacfwd, jvp
from two_convs import assert_starts_at_kaiming_variance

from csg_seg import load_compact, retrofit, save_compact, summarise
from csg_seg.errors import CSGError
from csg_seg.generators.lengths import row_length
from csg_seg.generators.registry import KINDS, build_generator
from csg_seg.generators.settings import Settings
from csg_seg.mm.model import build_model
from experiments.rivals.tensor_ring import count_cores

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
    rank, mode, cores = generator._ring()
    coefficients = code.view(cores, -1) * generator._scale()
    digits = [index // mode**place % mode for place in reversed(range(cores))]
    product = torch.eye(rank, dtype=code.dtype)
    for core, digit in zip(coefficients, digits, strict=True):
        product = product @ sum(c * basis[:, digit] for c, basis in zip(core, generator.weight, strict=True))
    return product.trace()


@pytest.mark.parametrize(('mode', 'cores'), MODES)
def test_a_value_is_the_trace_of_its_cores_product(mode, cores):
    generator = build(SMALL, mode=mode, code_dim=2 * cores).double()
    assert count_cores(generator.settings) == cores
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
    with pytest.raises(CSGError, match=f"made with {key}=.*set csg to the checkpoint's"):
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


CONFIG = ROOT / 'experiments' / 'rivals' / 'configs' / 'taught-csg-s4-d52-ring18_resnet20_b64-3e_cifar10-npz.py'


def test_its_config_brings_the_plug_in_and_says_what_is_stored():
    cfg = Config.fromfile(CONFIG)
    assert 'experiments.rivals.tensor_ring' in cfg.custom_imports.imports
    summary = summarise(build_model(cfg))
    assert (summary.stored_params, summary.dense_params) == (115_818, 269_722)
    assert '115,818 parameters stored for 269,722 dense, 2.33x' in CONFIG.read_text()


def test_without_the_plug_in_a_config_and_a_file_are_refused_in_one_line(monkeypatch, tmp_path):
    csg = {'slice_shape': (8, 8, 3, 3), 'code_dim': 10, 'generator': 'tensor_ring', 'rank': 3}

    def network():
        return nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3))

    save_compact(retrofit(network(), csg), tmp_path / 'ring')
    assert 'csg' in dict(load_compact(tmp_path / 'ring', network()).named_modules())
    monkeypatch.delitem(KINDS, 'tensor_ring')
    says = (
        "csg.0.: unknown generator 'tensor_ring', which was removed in 0.3.0 and is now in experiments/rivals; "
        "known are 'linear', 'binary', 'mlp'; import the module that registers it"
    )
    for refused in (lambda: retrofit(network(), csg), lambda: load_compact(tmp_path / 'ring', network())):
        with pytest.raises(CSGError, match=says) as caught:
            refused()
        assert '\n' not in str(caught.value)


GOOD = {'slice_shape': (16, 16, 3, 3)}
RING = GOOD | {'generator': 'tensor_ring', 'rank': 4, 'code_dim': 12}


@pytest.mark.parametrize(
    ('slice_shape', 'mode', 'cores'),
    [
        ((16, 16, 3, 3), 4, 6),
        ((16, 16, 1, 1), 4, 4),
        ((16, 16, 1, 1), 255, 2),
        ((12, 12, 3, 3), 6, 4),
        ((5, 1, 1, 1), 4, 2),
    ],
)
def test_the_cores_are_the_fewest_that_reach_every_value(slice_shape, mode, cores):
    assert count_cores(Settings.from_dict(RING | {'slice_shape': slice_shape, 'mode': mode})) == cores


@pytest.mark.parametrize(('csg', 'mode'), [(RING, 4), (RING | {'mode': 7, 'code_dim': 8}, 7)])
def test_the_mode_is_four_unless_given(csg, mode):
    settings = Settings.from_dict(csg)
    assert settings.options == {'rank': 4, 'mode': mode}
    assert Settings.from_dict(json.loads(json.dumps(settings.to_dict())), position=9) == settings


@pytest.mark.parametrize(
    ('csg', 'message'),
    [
        (GOOD | {'code_dim': 12, 'rank': 8}, "'rank' is a key of generator='tensor_ring', not of 'linear'; drop it"),
        (RING | {'generator': 'mlp', 'hidden': 8}, "'rank' is a key of generator='tensor_ring', not of 'mlp'"),
        (RING | {'rank': None}, "'rank' is missing; generator='tensor_ring' needs it, try rank=8"),
        (RING | {'rank': 0}, 'rank must be an integer of at least 1'),
        (RING | {'rank': 2.0}, 'rank must be an integer of at least 1'),
        (RING | {'mode': 1}, 'mode must be an integer of at least 2'),
        (RING | {'mode': 2304}, 'mode must be less than the 2304 values of a slice; got 2304'),
        (RING | {'code_dim': 128}, 'code_dim must be a multiple of 6, such as 126 or 132; got 128'),
        (RING | {'code_dim': 3}, 'code_dim must be a multiple of 6, such as 6 or 12; got 3'),
        (RING | {'mode': 48, 'code_dim': 5}, 'with 2 cores, so code_dim must be a multiple of 2, such as 4 or 6'),
    ],
)
def test_a_bad_value_is_refused_by_key_and_remedy(csg, message):
    with pytest.raises(CSGError, match=rf'csg\[3\].*{message}'):
        Settings.from_dict(csg, position=3)


@pytest.mark.parametrize(
    ('slice_shape', 'code_dim', 'rank', 'mode'),
    [
        ((12, 20, 3, 3), 72, 8, 4),
        ((12, 20, 3, 3), 24, 3, 7),
        ((16, 16, 3, 3), 120, 16, 4),
        ((16, 16, 3, 3), 10, 2, 48),
        ((16, 16, 1, 1), 60, 5, 4),
        ((1, 1, 3, 3), 8, 4, 3),
        ((12, 20, 1, 5), 6, 6, 4),
    ],
)
def test_its_weight_starts_at_its_layers_kaiming_variance(slice_shape, code_dim, rank, mode):
    ring = {'generator': 'tensor_ring', 'rank': rank, 'mode': mode}
    assert_starts_at_kaiming_variance({'slice_shape': slice_shape, 'code_dim': code_dim, **ring})
