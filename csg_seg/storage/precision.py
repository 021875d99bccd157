"""Weights of lower precision in files: half floats, or 8-bit integers with one scale for each row."""

from collections.abc import Collection, Mapping

import torch
from torch import Tensor, nn

from csg_seg.errors import CSGError
from csg_seg.layers.bank import BANK, find_roots
from csg_seg.layers.conv import DENSE_KINDS, check_finite, generated_convs

# Precisions of a file's matrices.
DTYPES = {'float32': torch.float32, 'float16': torch.float16, 'bfloat16': torch.bfloat16, 'int8': torch.int8}
# Suffix for the scales of an int8 matrix; names of a state dict have no colon.
SCALE = ':scale'
STEPS = 127
# Layers, and those of their parameters that may have lower precision.
KINDS = (
    ((*DENSE_KINDS, nn.Linear), ('weight',)),
    (nn.MultiheadAttention, ('in_proj_weight', 'q_proj_weight', 'k_proj_weight', 'v_proj_weight')),
)
# Half floats whose error is above this share of a tensor's largest value are refused. That of normal numbers is below
# 0.4 %; smaller numbers lose digits.
MOST_ERROR = 0.01


def matrices(model: nn.Module) -> set[str]:
    """Return the state-dict names that may have lower precision.

    They are those of codes and generators, and of the weights of convs, linear layers and attention.
    """
    names = {f'{name}.{key}' for name, conv in generated_convs(model, remove_duplicate=False) for key in conv.stored()}
    for prefix, _, bank in find_roots(model):
        names |= {f'{prefix}{BANK}.{name}' for name, parameter in bank.named_parameters() if parameter.ndim > 1}
    for name, module in model.named_modules(remove_duplicate=False):
        keys = (key for kind, keys in KINDS if isinstance(module, kind) for key in keys)
        names |= {f'{name}.{key}' if name else key for key in keys if module._parameters.get(key) is not None}
    parameters = [*model.named_parameters(remove_duplicate=False)]
    lowered = {id(parameter) for name, parameter in parameters if name in names}
    # A tied parameter has one precision under all its names.
    return names | {name for name, parameter in parameters if id(parameter) in lowered}


def lower(tensors: Mapping[str, Tensor], names: Collection[str], dtype: str) -> dict[str, Tensor]:
    """Convert some tensors of a state dict to lower precision.

    An int8 matrix is ``round(row / scale)`` with ``scale = max(abs(row)) / 127``, rows along the first dimension; its
    scales ``(rows,)`` are added in float32.

    Args:
        tensors: a state dict.
        names: see :func:`matrices`; tensors that are not floating are unchanged.
        dtype: a key of :data:`DTYPES`; 'float32' changes nothing.

    Raises:
        CSGError: the dtype is unknown, or cannot represent a value.
    """
    if dtype not in DTYPES:
        raise CSGError(f'there is no dtype {dtype!r} for files; use one of {", ".join(DTYPES)}')
    if dtype == 'float32':
        return dict(tensors)
    lowered = {}
    for name, tensor in tensors.items():
        if name not in names or not tensor.is_floating_point():
            lowered[name] = tensor
            continue
        check_finite(name, tensor)
        if dtype == 'int8':
            lowered[name], lowered[f'{name}{SCALE}'] = _quantise(tensor)
            continue
        lowered[name] = tensor.to(DTYPES[dtype])
        if not lowered[name].isfinite().all():
            raise CSGError(f'{name}: a value is too large for {dtype}; use bfloat16')
        if tensor.numel() and (lowered[name] - tensor).abs().max() > MOST_ERROR * tensor.abs().max():
            raise CSGError(f'{name}: the values are too small for {dtype}; use bfloat16')
    return lowered


def restore(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Convert int8 matrices written by :func:`lower` back to float32; other tensors are unchanged.

    Raises:
        CSGError: scales do not belong to an int8 matrix.
    """
    restored = dict(tensors)
    for name, scale in tensors.items():
        if not name.endswith(SCALE):
            continue
        matrix = name.removesuffix(SCALE)
        values = tensors.get(matrix)
        if values is None or values.dtype != torch.int8 or scale.shape != values.shape[:1]:
            raise CSGError(f'{name}: there is no int8 matrix with as many rows; the file cannot be used')
        restored[matrix] = values * scale.view(-1, *[1] * (values.ndim - 1))
        del restored[name]
    return restored


def _quantise(tensor: Tensor) -> tuple[Tensor, Tensor]:
    rows = tensor.detach().float().flatten(1)
    scale = (rows.abs().amax(1) if rows.numel() else rows.new_zeros(len(rows))) / STEPS
    steps = torch.where(scale > 0, scale, 1.0)
    return (rows / steps[:, None]).round().to(torch.int8).view(tensor.shape), scale
