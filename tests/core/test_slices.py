import itertools
import warnings

import pytest
import torch

from csg_seg.generators.slices import LAYOUTS, grid, join, split

# (weight, slice): overhang on both sides, on one, on none; a slice larger than the weight; odd kernels.
SHAPES = [
    ((17, 31, 3, 3), (12, 20, 3, 3)),
    ((17, 31, 1, 1), (12, 20, 1, 1)),
    ((24, 31, 3, 1), (12, 20, 3, 1)),
    ((24, 40, 3, 3), (12, 20, 3, 3)),
    ((5, 7, 1, 3), (16, 16, 1, 3)),
    ((17, 31, 2, 5), (1, 1, 2, 5)),
]


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def random_slices(weight_shape, slice_shape):
    rows, cols = grid(weight_shape, slice_shape)
    return random(rows * cols, *slice_shape)


def join_block_slowly(slices, weight_shape):
    _, s_out, s_in, _, _ = slices.shape
    cols = -(-weight_shape[1] // s_in)
    weight = torch.empty(weight_shape)
    for o, i in itertools.product(range(weight_shape[0]), range(weight_shape[1])):
        row, col = o // s_out, i // s_in
        weight[o, i] = slices[row * cols + col, o % s_out, i % s_in]
    return weight


def join_flat_slowly(slices, weight_shape):
    """Reshape the ``(n, prod)`` matrix raw, then crop, one value at a time."""
    _, _, s_in, kh, kw = slices.shape
    padded_in = -(-weight_shape[1] // s_in) * s_in
    values = slices.flatten().tolist()
    weight = torch.empty(weight_shape)
    for o, i, y, x in itertools.product(*map(range, weight_shape)):
        weight[o, i, y, x] = values[((o * padded_in + i) * kh + y) * kw + x]
    return weight


@pytest.mark.parametrize(('weight_shape', 'slice_shape'), SHAPES)
def test_grid_is_the_least_that_covers_the_weight(weight_shape, slice_shape):
    rows, cols = grid(weight_shape, slice_shape)
    assert (rows - 1) * slice_shape[0] < weight_shape[0] <= rows * slice_shape[0]
    assert (cols - 1) * slice_shape[1] < weight_shape[1] <= cols * slice_shape[1]


@pytest.mark.parametrize('layout', LAYOUTS)
@pytest.mark.parametrize(('weight_shape', 'slice_shape'), SHAPES)
def test_join_inverts_split(weight_shape, slice_shape, layout):
    weight = random(*weight_shape)
    slices = split(weight, slice_shape, layout=layout)
    assert slices.shape[1:] == slice_shape
    assert torch.equal(join(slices, weight_shape, layout=layout), weight)


@pytest.mark.parametrize('layout', LAYOUTS)
@pytest.mark.parametrize(('weight_shape', 'slice_shape'), SHAPES)
def test_split_inverts_join_and_zeroes_the_overhang(weight_shape, slice_shape, layout):
    slices = random_slices(weight_shape, slice_shape)
    covered = split(torch.ones(weight_shape), slice_shape, layout=layout)
    assert covered.sum() == torch.Size(weight_shape).numel()
    assert torch.equal(split(join(slices, weight_shape, layout=layout), slice_shape, layout=layout), slices * covered)


@pytest.mark.parametrize(('weight_shape', 'slice_shape'), SHAPES)
def test_block_layout_agrees_with_a_slow_loop(weight_shape, slice_shape):
    slices = random_slices(weight_shape, slice_shape)
    assert torch.equal(join(slices, weight_shape, layout='block'), join_block_slowly(slices, weight_shape))


@pytest.mark.parametrize(('weight_shape', 'slice_shape'), SHAPES)
def test_flat_layout_agrees_with_a_slow_loop(weight_shape, slice_shape):
    slices = random_slices(weight_shape, slice_shape)
    assert torch.equal(join(slices, weight_shape, layout='flat'), join_flat_slowly(slices, weight_shape))


def test_layouts_differ_when_the_grid_has_two_columns():
    slices = random_slices((17, 31, 3, 3), (12, 20, 3, 3))
    block, flat = (join(slices, (17, 31, 3, 3), layout=layout) for layout in LAYOUTS)
    assert not torch.equal(block, flat)


@pytest.mark.parametrize('layout', LAYOUTS)
def test_gradient_reaches_each_weight_value_once_and_no_overhang(layout):
    slices = random_slices((17, 31, 3, 3), (12, 20, 3, 3)).requires_grad_()
    join(slices, (17, 31, 3, 3), layout=layout).sum().backward()
    assert torch.equal(slices.grad, split(torch.ones(17, 31, 3, 3), (12, 20, 3, 3), layout=layout))


@pytest.mark.parametrize('layout', LAYOUTS)
def test_dtype_is_kept(layout):
    weight = random(17, 31, 3, 3).double()
    slices = split(weight, (12, 20, 3, 3), layout=layout)
    assert slices.dtype == join(slices, weight.shape, layout=layout).dtype == torch.float64


@pytest.mark.parametrize('layout', LAYOUTS)
@pytest.mark.parametrize(('weight_shape', 'slice_shape'), SHAPES)
def test_a_trace_has_the_grid_as_constants(weight_shape, slice_shape, layout):
    slices = random_slices(weight_shape, slice_shape)
    with warnings.catch_warnings():
        warnings.simplefilter('error', torch.jit.TracerWarning)
        warnings.simplefilter('ignore', DeprecationWarning)
        traced = torch.jit.trace(lambda given: join(given, weight_shape, layout=layout), slices)
    assert torch.equal(traced(-slices), join(-slices, weight_shape, layout=layout))
    assert not {'aten::size', 'aten::floor_divide', 'aten::mul', 'aten::neg'} & {
        node.kind() for node in traced.inlined_graph.nodes()
    }


@pytest.mark.parametrize('slice_shape', [(12, 20, 1, 1), (12, 20, 3, 1), (12, 20, 1, 3)])
def test_another_kernel_is_refused(slice_shape):
    weight = torch.zeros(17, 31, 3, 3)
    with pytest.raises(ValueError, match='kernels differ'):
        grid(weight.shape, slice_shape)
    with pytest.raises(ValueError, match='kernels differ'):
        split(weight, slice_shape)
    with pytest.raises(ValueError, match='kernels differ'):
        join(torch.zeros(4, *slice_shape), weight.shape)


@pytest.mark.parametrize('layout', LAYOUTS)
@pytest.mark.parametrize('count', [0, 1, 3, 5])
def test_a_wrong_number_of_slices_is_refused(layout, count):
    with pytest.raises(ValueError, match=rf'{count} slices .* needs a grid of 2 x 2 = 4'):
        join(torch.zeros(count, 12, 20, 3, 3), (17, 31, 3, 3), layout=layout)
