"""Weights to slices and back, in both layouts.

A conv weight ``(out, in, kh, kw)`` is covered by a grid of ``(rows, cols)``
slices of shape ``(s_out, s_in, kh, kw)``; values beyond the weight's edge are
cropped. Omidvar et al., AISTATS 2021, section 2. Kernels may also have one or three
dimensions. Here ``out`` and ``in`` are the first two dimensions of the weight:
``(out, in / groups)``, or ``(in, out / groups)`` for transposed convs.
"""

import warnings
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

LAYOUTS = ('block', 'flat')


def grid(weight_shape: Sequence[int], slice_shape: Sequence[int]) -> tuple[int, int]:
    """Return the grid ``(rows, cols)`` of slices that covers a weight.

    Raises:
        ValueError: the kernels differ.
    """
    out_channels, in_channels, *kernel = weight_shape
    s_out, s_in, *slice_kernel = slice_shape
    if tuple(kernel) != tuple(slice_kernel):
        raise ValueError(
            f'a weight of shape {tuple(weight_shape)} has no grid of slices of shape {tuple(slice_shape)}: '
            'their kernels differ'
        )
    return -(-out_channels // s_out), -(-in_channels // s_in)


def join(slices: Tensor, weight_shape: Sequence[int], *, layout: str = 'block', channels_last: bool = False) -> Tensor:
    """Assemble a grid of slices into a conv weight, cropping the overhang.

    The paper, Omidvar et al., AISTATS 2021, section 2, describes the layout 'block'.
    The authors' released code uses 'flat'.

    Args:
        slices: ``(rows * cols, s_out, s_in, kh, kw)``, row by row.
        weight_shape: ``(out, in, kh, kw)``.
        layout: 'block' puts slice ``(r, c)`` at rows ``r * s_out`` and columns
            ``c * s_in`` of the weight; 'flat' reshapes all values in order.
        channels_last: whether the weight's memory is in channels-last order.

    Raises:
        ValueError: the number of slices does not match the grid, or the layout is unknown.
    """
    _check_layout(layout)
    n_slices, s_out, s_in, *kernel = _sizes(slices)
    rows, cols = grid(weight_shape, (s_out, s_in, *kernel))
    if n_slices != rows * cols:
        raise ValueError(
            f'{n_slices} slices do not make a weight of shape {tuple(weight_shape)}, '
            f'which needs a grid of {rows} x {cols} = {rows * cols}'
        )
    if layout == 'block':
        grid_of_slices = slices.reshape(rows, cols, s_out, s_in, *kernel)
        slices = grid_of_slices.transpose(1, 2)
    else:
        slices = slices.reshape(rows, s_out, cols, s_in, *kernel)
    if channels_last:  # one copy, in the order of memory
        slices = slices.permute(0, 1, *range(4, slices.dim()), 2, 3).contiguous()
        whole = slices.reshape(rows * s_out, *kernel, cols * s_in).movedim(-1, 1)
    else:
        whole = slices.reshape(rows * s_out, cols * s_in, *kernel)
    return whole[: weight_shape[0], : weight_shape[1]]


def in_memory_order(weight: Tensor, *, channels_last: bool) -> Tensor:
    """Return a weight without gaps in memory, copied if necessary.

    Args:
        weight: ``(out, in, kh, kw)``.
        channels_last: whether memory is in channels-last order.
    """
    if channels_last:
        return weight.movedim(1, -1).contiguous().movedim(-1, 1)
    return weight.contiguous()


def split(weight: Tensor, slice_shape: Sequence[int], *, layout: str = 'block') -> Tensor:
    """Cut a conv weight into its grid of slices, with zeros as overhang.

    The inverse of :func:`join`.

    Args:
        weight: ``(out, in, kh, kw)``.
        slice_shape: ``(s_out, s_in, kh, kw)``.
        layout: as in :func:`join`.

    Returns:
        ``(rows * cols, s_out, s_in, kh, kw)``, row by row.

    Raises:
        ValueError: the kernels differ, or the layout is unknown.
    """
    _check_layout(layout)
    rows, cols = grid(weight.shape, slice_shape)
    s_out, s_in, *kernel = slice_shape
    overhang = (0, cols * s_in - weight.shape[1], 0, rows * s_out - weight.shape[0])
    whole = F.pad(weight, (0, 0) * len(kernel) + overhang)
    if layout == 'block':
        grid_of_slices = whole.reshape(rows, s_out, cols, s_in, *kernel)
        whole = grid_of_slices.transpose(1, 2)
    return whole.reshape(rows * cols, s_out, s_in, *kernel)


def _sizes(tensor: Tensor) -> Sequence[int]:
    """Return a tensor's shape in plain numbers.

    In a trace the sizes are tensors, and arithmetic on them becomes part of the graph.
    ONNX rounds integer division towards zero, so the grid would be too small.
    """
    shape = tensor.shape
    if not isinstance(shape[0], Tensor):
        return shape
    with warnings.catch_warnings():
        # It warns that a size becomes a constant. This is intended: a conv's weight has a fixed shape.
        warnings.simplefilter('ignore', torch.jit.TracerWarning)
        return [int(size) for size in shape]


def _check_layout(layout: str) -> None:
    if layout not in LAYOUTS:
        raise ValueError(f'layout {layout!r} is unknown; use one of {LAYOUTS}')
