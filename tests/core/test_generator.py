import copy
import hashlib
import json
import pickle
import subprocess
import sys

import pytest
import torch
from torch import nn

from csg_seg.errors import CSGError
from csg_seg.generators.lengths import row_length
from csg_seg.generators.linear import Generator
from csg_seg.generators.registry import KINDS as REGISTERED
from csg_seg.generators.registry import Option, build_generator, register_generator
from csg_seg.generators.settings import Settings
from csg_seg.generators.signature import encode_signature, read_layers, read_signature

# 12 * 20 * 9 values, 7 codes: sizes that are no multiple of 8 bits, 16 lanes or each other.
CSG = {'slice_shape': (12, 20, 3, 3), 'code_dim': 7}
SIZE = 12 * 20 * 3 * 3
KINDS = ('linear', 'binary')

# Fixed once and for ever: files of binary generators hold the seed alone.
SIGNS_OF_SEED_5 = '34b4e80a0ad0b7e2a40656f5c2da3bbac247c8981bcd0d05a02ae05da6a61e3f'


def build(**changes):
    settings = Settings.from_dict(CSG | changes)
    return build_generator(settings, torch.Generator().manual_seed(settings.seed))


def digest(signs):
    return hashlib.sha256((signs > 0).to(torch.uint8).numpy().tobytes()).hexdigest()


def random_codes(n, code_dim=CSG['code_dim'], seed=0):
    return torch.randn(n, code_dim, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize('kind', KINDS)
def test_a_slice_is_its_code_times_the_generator(kind):
    generator = build(generator=kind)
    code = random_codes(5)
    slices = generator(code)
    assert slices.shape == (5, 12, 20, 3, 3)
    for each, slice in zip(code, slices, strict=True):
        slowly = sum(each[i] * generator.weight[i] for i in range(CSG['code_dim'])).view(12, 20, 3, 3)
        torch.testing.assert_close(slice, slowly, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize('kind', KINDS)
def test_rows_start_at_one_length_and_nearly_orthogonal(kind):
    generator = build(generator=kind, code_dim=64)
    rows = generator.weight.detach().flatten(1).double() / row_length(generator.settings)
    gram = rows @ rows.T
    # A cosine of random rows has a std of 1 / sqrt(SIZE); six of them bound 4096 draws.
    assert (gram - torch.eye(64)).abs().max() < 6 * SIZE**-0.5


@pytest.mark.parametrize('code_dim', [9, 72])
@pytest.mark.parametrize('kind', KINDS)
def test_a_step_on_codes_moves_the_weight_as_far_as_the_dense_step(kind, code_dim):
    generator = build(generator=kind, code_dim=code_dim)
    code = random_codes(200, code_dim).requires_grad_()
    dense = torch.randn(200, *CSG['slice_shape'], generator=torch.Generator().manual_seed(1))
    (generator(code) * dense).sum().backward()
    moved = generator(code.grad)
    # A share code_dim / SIZE of 200 random directions, and rows that are orthogonal only nearly.
    assert (moved.norm() / dense.norm()).item() == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize('kind', KINDS)
def test_the_seed_alone_decides_the_start(kind):
    torch.manual_seed(0)
    one = build(generator=kind, seed=5)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    same, other = build(generator=kind, seed=5), build(generator=kind, seed=6)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(one.weight, same.weight)
    assert not torch.equal(one.weight, other.weight)


@pytest.mark.parametrize(('change', 'trained'), [({}, True), ({'freeze_generator': True}, False)])
def test_a_linear_generator_trains_unless_frozen(change, trained):
    generator = build(**change)
    assert [p.requires_grad for p in generator.parameters()] == [trained]


def test_binary_values_are_signs_of_one_size():
    generator = build(generator='binary')
    value = row_length(generator.settings) / SIZE**0.5
    assert torch.equal(generator.weight.abs(), torch.full_like(generator.weight, value))


def test_binary_signs_are_fair():
    signs = build(generator='binary', code_dim=128).weight.sign()
    # Four standard deviations of a fair coin.
    assert abs((signs > 0).double().mean() - 0.5) < 4 * 0.5 * signs.numel() ** -0.5
    per_row = (signs > 0).double().flatten(1).mean(dim=1)
    assert (per_row - 0.5).abs().max() < 5 * 0.5 * SIZE**-0.5


def test_a_binary_generator_has_nothing_to_train():
    generator = build(generator='binary')
    assert list(generator.parameters()) == []
    assert not generator.weight.requires_grad


def test_binary_signs_of_a_seed_never_change():
    assert digest(build(generator='binary', seed=5).weight) == SIGNS_OF_SEED_5


def test_binary_signs_are_rebuilt_bit_for_bit_by_a_fresh_process():
    generator = build(generator='binary', seed=5)
    script = f"""
import hashlib
import torch
from csg_seg.generators.registry import build_generator
from csg_seg.generators.settings import Settings
settings = Settings.from_dict({CSG | {'generator': 'binary', 'seed': 5}!r})
weight = build_generator(settings, torch.Generator()).weight
print(hashlib.sha256(weight.numpy().tobytes()).hexdigest())
"""
    fresh = subprocess.run([sys.executable, '-c', script], capture_output=True, text=True, check=True).stdout.strip()
    assert fresh == hashlib.sha256(generator.weight.numpy().tobytes()).hexdigest()


def test_a_binary_state_dict_holds_the_settings_bytes_alone():
    generator = build(generator='binary', seed=5)
    state = generator.state_dict()
    assert list(state) == ['_extra_state']
    assert state['_extra_state'].dtype == torch.uint8
    meaning = {'generator': 'binary', 'slice_shape': [12, 20, 3, 3], 'code_dim': 7, 'layout': 'block', 'seed': 5}
    stored = json.loads(bytes(state['_extra_state'].tolist()))
    assert stored.pop('value') == pytest.approx(generator.weight.abs().max().item())
    assert stored == meaning


def test_codes_are_not_read_with_signs_of_another_size():
    generator = build(generator='binary')
    stored = json.loads(bytes(generator.get_extra_state().tolist()))
    for changed in ({**stored, 'value': SIZE**-0.5}, {key: value for key, value in stored.items() if key != 'value'}):
        state = torch.tensor(list(json.dumps(changed).encode()), dtype=torch.uint8)
        with pytest.raises(CSGError, match='value'):
            generator.set_extra_state(state)


def test_a_linear_state_dict_holds_the_weight_and_the_settings_bytes():
    assert list(build().state_dict()) == ['weight', '_extra_state']


def test_loading_takes_over_the_seed_of_a_stored_binary_generator():
    stored, loaded = build(generator='binary', seed=5), build(generator='binary', seed=8)
    assert not torch.equal(stored.weight, loaded.weight)
    loaded.load_state_dict(stored.state_dict())
    assert torch.equal(stored.weight, loaded.weight)
    assert loaded.settings == stored.settings
    assert torch.equal(loaded.state_dict()['_extra_state'], stored.state_dict()['_extra_state'])


def test_loading_a_linear_generator_takes_its_weight_whatever_its_seed():
    stored, loaded = build(seed=5), build(seed=8)
    loaded.load_state_dict(stored.state_dict())
    assert torch.equal(stored.weight, loaded.weight)


def test_signs_that_were_cast_and_cast_back_are_those_of_the_seed():
    generator = build(generator='binary', seed=5)
    exact = generator.weight.clone()
    assert torch.equal(generator.bfloat16().weight, exact.bfloat16())
    assert torch.equal(generator.float().weight, exact)
    assert torch.equal(generator.half().double().weight.float(), exact)


def test_a_loaded_binary_generator_keeps_its_dtype():
    loaded = build(generator='binary', seed=8).half()
    loaded.load_state_dict(build(generator='binary', seed=5).state_dict())
    assert loaded.weight.dtype == torch.float16
    assert digest(loaded.weight) == SIGNS_OF_SEED_5


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('copied', [copy.deepcopy, lambda generator: pickle.loads(pickle.dumps(generator))])
def test_a_copy_is_equal_and_independent(kind, copied):
    generator = build(generator=kind, seed=5)
    kept = generator.weight.detach().clone()
    twin = copied(generator)
    assert type(twin) is type(generator)
    assert twin.settings == generator.settings
    assert torch.equal(twin.weight, generator.weight)
    with torch.no_grad():
        twin.weight.zero_()
    assert torch.equal(generator.weight, kept)


@pytest.mark.parametrize('kind', KINDS)
def test_casting_moves_the_weight_along(kind):
    generator = build(generator=kind)
    kept = generator.weight.detach().clone()
    generator.double()
    assert generator(random_codes(2).double()).dtype == torch.float64
    assert torch.equal(generator.weight, kept.double())
    generator.half()
    assert generator(random_codes(2).half()).dtype == torch.float16
    assert torch.equal(generator.weight, kept.half())


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('weight_std', [0.01, 3.0])
def test_code_std_gives_slices_the_wanted_std(kind, weight_std):
    generator = build(generator=kind, code_dim=31)
    rng = torch.Generator().manual_seed(0)
    code = torch.empty(400, 31).normal_(0.0, generator.code_std(weight_std), generator=rng)
    assert generator(code).std().item() == pytest.approx(weight_std, rel=0.05)


def test_a_linear_generator_can_be_set_to_a_basis():
    generator = build()
    basis = torch.randn(CSG['code_dim'], SIZE, generator=torch.Generator().manual_seed(0))
    weight = generator.weight
    generator.set_linear(basis.double())
    assert generator.weight is weight
    assert torch.equal(generator.weight, basis)
    with pytest.raises(CSGError, match=r'this generator needs a basis of shape \(7, 2160\), got \(2160, 7\)'):
        generator.set_linear(basis.T)


def test_random_signs_cannot_be_set():
    with pytest.raises(CSGError, match="a binary generator cannot be set to a basis; use generator='linear'"):
        build(generator='binary').set_linear(torch.zeros(7, SIZE))


@pytest.mark.parametrize(
    'change',
    [
        {'slice_shape': (20, 12, 3, 3)},
        {'slice_shape': (12, 20, 1, 9)},
        {'code_dim': 8},
        {'layout': 'flat'},
        {'generator': 'binary'},
        {'residual': 1},
    ],
)
def test_anothers_state_is_refused_by_the_key_that_differs(change):
    (key,) = change
    with pytest.raises(CSGError, match=f"made with {key}=.*set csg to the checkpoint's"):
        build().load_state_dict(build(**change).state_dict(), strict=False)


GOLDEN_BYTES = [  # written by csg_seg 0.2.0: without layers, with layers
    (
        {},
        b'{"generator": "linear", "slice_shape": [12, 20, 3, 3], "code_dim": 24, "layout": "block"}',
        b'{"generator":"linear","slice_shape":[12,20,3,3],"code_dim":24,"layout":"block",'
        b'"layers":{"body.3":[31,17,3,3]},"crc32":3910654433}',
    ),
    (
        {'generator': 'binary', 'seed': 5},
        b'{"generator": "binary", "slice_shape": [12, 20, 3, 3], "code_dim": 24, "layout": "block", '
        b'"value": 0.06627256073058756, "seed": 5}',
        b'{"generator":"binary","slice_shape":[12,20,3,3],"code_dim":24,"layout":"block",'
        b'"value":0.06627256073058756,"seed":5,"layers":{"body.3":[31,17,3,3]},"crc32":4173551684}',
    ),
    (
        {'generator': 'mlp', 'hidden': 5, 'residual': 2},
        b'{"generator": "mlp", "slice_shape": [12, 20, 3, 3], "code_dim": 24, "layout": "block", '
        b'"hidden": 5, "residual": 2}',
        b'{"generator":"mlp","slice_shape":[12,20,3,3],"code_dim":24,"layout":"block","hidden":5,"residual":2,'
        b'"layers":{"body.3":[31,17,3,3]},"crc32":3167499885}',
    ),
    (
        {'layout': 'flat', 'residual': 1},
        b'{"generator": "linear", "slice_shape": [12, 20, 3, 3], "code_dim": 24, "layout": "flat", "residual": 1}',
        b'{"generator":"linear","slice_shape":[12,20,3,3],"code_dim":24,"layout":"flat","residual":1,'
        b'"layers":{"body.3":[31,17,3,3]},"crc32":2171853035}',
    ),
]


@pytest.mark.parametrize(('change', 'without_layers', 'with_layers'), GOLDEN_BYTES)
def test_settings_bytes_never_change(change, without_layers, with_layers):
    settings, layers = Settings.from_dict(CSG | {'code_dim': 24} | change), {'body.3': (31, 17, 3, 3)}
    assert bytes(encode_signature(settings, None).tolist()) == without_layers
    assert bytes(encode_signature(settings, layers).tolist()) == with_layers
    assert read_layers(encode_signature(settings, layers)) == layers


def test_settings_bytes_of_version_0_1_0_are_written_and_read():
    # Version 0.1.0 had the paper's generators only, and stored no layers.
    stored = b'{"generator": "linear", "slice_shape": [12, 20, 3, 3], "code_dim": 7, "layout": "block"}'
    assert bytes(build().get_extra_state().tolist()) == stored
    build().set_extra_state(torch.tensor(list(stored), dtype=torch.uint8))
    assert read_signature(build(generator='binary').get_extra_state()).keys() >= {'value', 'seed'}


@pytest.mark.parametrize('text', [b'', b'{', b'[]', b'7', b'{"seed": 3}', b'\xff\xfe'])
def test_damaged_settings_bytes_are_refused(text):
    state = torch.tensor(list(text), dtype=torch.uint8)
    with pytest.raises(CSGError, match='damaged .* use another copy'):
        read_signature(state)


def to_state(stored):
    return torch.tensor(list(json.dumps(stored).encode()), dtype=torch.uint8)


@pytest.mark.parametrize('key', ['seed', 'value'])
def test_binary_settings_without_a_value_of_their_kind_are_damaged(key):
    generator = build(generator='binary')
    stored = json.loads(bytes(generator.get_extra_state().tolist()))
    del stored[key]
    with pytest.raises(CSGError, match=rf"generator settings are damaged \('{key}' is missing\); use another copy"):
        generator.set_extra_state(to_state(stored))


@pytest.fixture
def registered():
    """The kinds by name; those that a test registers are removed after it."""
    before = dict(REGISTERED)
    yield REGISTERED
    REGISTERED.clear()
    REGISTERED.update(before)


def test_an_option_that_is_not_stored_has_the_kinds_default(registered):
    @register_generator('grown')
    class Grown(Generator):
        OPTIONS = {'width': Option(minimum=1, default=3)}

    stored = json.loads(bytes(build(generator='grown').get_extra_state().tolist()))
    assert stored.pop('width') == 3
    build(generator='grown').set_extra_state(to_state(stored))
    with pytest.raises(CSGError, match='made with width=3, this model has width=4'):
        build(generator='grown', width=4).set_extra_state(to_state(stored))


OWN_NAMES = [
    *('slice_shape', 'code_dim', 'layout', 'generator', 'freeze_generator', 'include', 'exclude', 'seed', 'options'),
    *('residual', 'layers', 'crc32', 'value'),
]


@pytest.mark.parametrize('name', OWN_NAMES)
def test_an_option_with_a_name_of_the_package_is_refused_and_breaks_no_other_kind(registered, name):
    with pytest.raises(CSGError, match=f"generator 'clash': csg_seg itself uses the name '{name}'; rename the option"):

        @register_generator('clash')
        class Clash(Generator):
            OPTIONS = {'width': Option(minimum=1), name: Option(minimum=1, default=2)}

    assert 'clash' not in registered
    build(residual=1, seed=3)


def test_a_kind_does_not_take_the_name_of_another():
    class Zero(Generator):
        pass

    with pytest.raises(CSGError, match="'linear': Generator has this name already; choose another"):
        register_generator('linear')(Zero)
    assert REGISTERED['linear'] is Generator
    with pytest.raises(CSGError, match=r"needs a name, such as @register_generator\('mine'\)"):
        register_generator(Zero)


@pytest.mark.parametrize('kind', [nn.Linear, build_generator, 7])
def test_only_a_subclass_of_generator_is_registered(registered, kind):
    with pytest.raises(CSGError, match="generator 'other': .* is not a subclass of csg_seg.generators.linear.Gen"):
        register_generator('other')(kind)
    assert 'other' not in registered


def test_the_weight_is_a_parameter_or_a_buffer():
    assert isinstance(build().weight, nn.Parameter)
    assert [name for name, _ in build(generator='binary').named_buffers()] == ['weight']
