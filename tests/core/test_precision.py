"""Lower precision in compact checkpoints: errors, sizes, refusals."""

import pytest
import torch
from safetensors import safe_open
from torch import nn

from csg_seg import load_compact, retrofit, save_compact
from csg_seg.errors import CSGError
from csg_seg.storage.format import read_compact
from csg_seg.storage.precision import DTYPES, SCALE, lower, matrices, restore

CSG = dict(slice_shape=(12, 20, 3, 3), code_dim=9)
KINDS = [{}, {'generator': 'binary'}, {'generator': 'mlp', 'hidden': 5}, {'residual': 2}]


class Net(nn.Module):
    """Every kind of layer whose weight may be of lower precision, and some that may not."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Conv2d(3, 31, 3)
        self.norm = nn.BatchNorm2d(31)
        self.narrow = nn.Conv2d(31, 17, 3)
        self.grouped = nn.Conv2d(17, 17, 3, groups=17)
        self.up = nn.ConvTranspose2d(17, 5, 2)
        self.position = nn.Parameter(torch.randn(1, 5, 1, 1))
        self.head = nn.Linear(5, 4)

    def forward(self, x):
        x = self.up(self.grouped(self.narrow(self.norm(self.stem(x)).relu()))) + self.position
        return self.head(x.mean(dim=(2, 3)))


def build(**changes):
    model = retrofit(Net(), CSG | changes).eval()
    if 'residual' in changes:
        nn.init.normal_(model.narrow.residual_out)
    return model


@pytest.mark.parametrize('kind', KINDS)
def test_matrices_are_codes_generators_and_weights(kind):
    model = build(**kind)
    names = matrices(model)
    assert {'stem.weight', 'narrow.code', 'grouped.weight', 'up.weight', 'head.weight'} <= names
    assert {name for name in names if 'residual' in name} == (
        {'narrow.residual_in', 'narrow.residual_out'} if 'residual' in kind else set()
    )
    state = model.state_dict()
    generator = {name for name in state if name.startswith('csg.') and state[name].ndim > 1}
    assert generator <= names
    left = state.keys() - names
    assert {'position', 'norm.weight', 'norm.running_mean', 'stem.bias', 'head.bias'} <= left
    assert {name for name in left if state[name].ndim > 1} == {'position'}


def test_projections_of_attention_have_lower_precision():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.convs = nn.Sequential(nn.Conv2d(3, 32, 3), nn.Conv2d(32, 32, 3))
            self.one, self.other = nn.MultiheadAttention(32, 2), nn.MultiheadAttention(32, 2, kdim=16, vdim=8)

    names = {name for name in matrices(retrofit(Net(), {'slice_shape': (8, 8, 3, 3), 'code_dim': 8})) if 'proj' in name}
    own = {'one.in_proj_weight', 'one.out_proj.weight', 'other.out_proj.weight'}
    assert names == own | {f'other.{key}_proj_weight' for key in 'qkv'}


@pytest.mark.parametrize('shape', [(7, 5), (7, 5, 3, 3), (1, 1), (9, 1, 3, 3)])
def test_an_int8_row_is_within_half_a_step(shape):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * torch.logspace(-6, 3, shape[0]).view(
        -1, *[1] * (len(shape) - 1)
    )
    stored = lower({'x': matrix}, ['x'], 'int8')
    assert stored['x'].dtype == torch.int8 and stored[f'x{SCALE}'].shape == shape[:1]
    step = matrix.flatten(1).abs().amax(1) / 127
    error = (restore(stored)['x'] - matrix).flatten(1).abs().amax(1)
    assert (error <= 0.5001 * step).all()


@pytest.mark.parametrize('shape', [(4, 0), (0, 4), (3, 0, 1, 1)])
def test_an_empty_matrix_is_stored(shape):
    assert restore(lower({'x': torch.zeros(shape)}, ['x'], 'int8'))['x'].shape == shape


def test_rows_of_zeros_stay_zeros():
    matrix = torch.zeros(3, 4)
    matrix[1] = torch.tensor([1.0, -2.0, 0.0, 0.5])
    back = restore(lower({'x': matrix}, ['x'], 'int8'))['x']
    assert torch.equal(back[[0, 2]], torch.zeros(2, 4)) and back[1, 1] == -2.0


# Of half floats the rounding of 10 and 7 bits; of int8, 1 / 254 of the largest of each row.
@pytest.mark.parametrize(('dtype', 'bound'), [('float16', 2**-11), ('bfloat16', 2**-8), ('int8', 1 / 254)])
@pytest.mark.parametrize('kind', KINDS)
def test_a_network_comes_back_within_its_precision(tmp_path, kind, dtype, bound):
    model = build(**kind)
    save_compact(model, tmp_path / 'x', dtype=dtype)
    loaded = load_compact(tmp_path / 'x', Net()).state_dict()
    for name, tensor in model.state_dict().items():
        if name not in matrices(model):
            assert torch.equal(loaded[name], tensor) or name.endswith('_extra_state'), name
            continue
        assert loaded[name].dtype == torch.float32
        largest = tensor.flatten(1).abs().amax(1)
        assert ((loaded[name] - tensor).flatten(1).abs().amax(1) <= 1.001 * bound * largest).all(), name
        assert not torch.equal(loaded[name], tensor), name


def test_lower_precisions_take_fewer_bytes(tmp_path):
    model = build()
    for dtype in ('float32', 'float16', 'bfloat16', 'int8'):
        save_compact(model, tmp_path / dtype, dtype=dtype)
    held = sum(each.numel() for name, each in model.state_dict().items() if name in matrices(model))
    size = {path.name: path.stat().st_size for path in tmp_path.iterdir()}
    assert size['float32'] - size['float16'] == pytest.approx(2 * held, abs=100)
    assert size['float32'] - size['bfloat16'] == pytest.approx(2 * held, abs=100)
    assert size['float32'] - size['int8'] > 2.5 * held


def test_an_int8_file_that_is_loaded_and_saved_has_the_same_tensors(tmp_path):
    save_compact(build(), tmp_path / 'one', dtype='int8')
    save_compact(load_compact(tmp_path / 'one', Net()), tmp_path / 'two', dtype='int8')
    one, two = (read_compact(tmp_path / name).tensors for name in ('one', 'two'))
    assert one.keys() == two.keys()
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ('value', 'dtype', 'says'),
    [
        (1e6, 'float16', 'head.weight: a value is too large for float16; use bfloat16'),
        (float('nan'), 'int8', 'head.weight holds NaN or infinite values'),
        (float('nan'), 'float32', 'head.weight holds NaN or infinite values'),
        (float('inf'), 'bfloat16', 'head.weight holds NaN or infinite values'),
        (1.0, 'int4', "no dtype 'int4' for files; use one of float32, float16, bfloat16, int8"),
    ],
)
def test_what_a_precision_cannot_hold_is_refused(tmp_path, value, dtype, says):
    model = build()
    model.head.weight.data[0, 0] = value
    with pytest.raises(CSGError, match=says):
        save_compact(model, tmp_path / 'x', dtype=dtype)
    assert not list(tmp_path.iterdir())


def test_values_that_half_floats_round_to_nothing_are_refused(tmp_path):
    model = build()
    with torch.no_grad():
        model.narrow.code.mul_(1e-8)
    with pytest.raises(CSGError, match='narrow.code: the values are too small for float16; use bfloat16'):
        save_compact(model, tmp_path / 'x', dtype='float16')
    save_compact(model, tmp_path / 'x', dtype='bfloat16')


def test_a_tied_weight_has_one_precision(tmp_path):
    model = Net()
    model.embedding = nn.Embedding(4, 5)
    model.head.weight = model.embedding.weight
    save_compact(retrofit(model, CSG), tmp_path / 'x', dtype='int8')
    with safe_open(tmp_path / 'x', 'pt') as file:
        assert {file.get_tensor(f'{name}.weight').dtype for name in ('embedding', 'head')} == {torch.int8}


@pytest.mark.parametrize('dtype', ['float16', 'int8'])
def test_a_layer_in_two_places_is_rounded_in_both(tmp_path, dtype):
    model = Net()
    model.alias = model.narrow
    retrofit(model, CSG)
    save_compact(model, tmp_path / 'x', dtype=dtype)
    with safe_open(tmp_path / 'x', 'pt') as file:
        assert {file.get_tensor(name).dtype for name in ('narrow.code', 'alias.code')} == {DTYPES[dtype]}


@pytest.mark.parametrize('scale', [torch.ones(2), torch.ones(3, 1), None])
def test_scales_that_do_not_fit_are_refused(scale):
    tensors = {'x': torch.zeros(3, 2, dtype=torch.int8), f'x{SCALE}': torch.ones(3)}
    if scale is None:
        del tensors['x']
    else:
        tensors[f'x{SCALE}'] = scale
    with pytest.raises(CSGError, match='no int8 matrix with as many rows'):
        restore(tensors)
