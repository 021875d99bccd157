"""Rename the tensors of a checkpoint that other code wrote for the same network."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from csg_seg.errors import CSGError
from csg_seg.mm.checkpoints.unpickling import check_file, read_tensors

# Code of the time before this counter was added to norm layers has none; networks count anew.
COUNTER = '.num_batches_tracked'


def read_state_dict(path: str | os.PathLike, entry: str | None = None) -> dict[str, Tensor]:
    """Read the tensors of a checkpoint of any code, without unpickling objects.

    Args:
        path: a file written by ``torch.save``: a state dict, or a dict with one in an entry such as ``model``.
        entry: name of that entry; None if there is only one.

    Raises:
        FileNotFoundError: there is no such file.
        CSGError: the file is damaged, or holds no state dict, or several and ``entry`` names none of them.
    """
    check_file(path)
    if Path(path).suffix == '.safetensors':
        raise CSGError(f'{path}: not a .pth file; a compact file has the names of its config already')
    content = read_tensors(path)
    if entry is None and _is_state_dict(content):
        return dict(content)
    parts = content.items() if isinstance(content, dict) else ()
    entries = {name: each for name, each in parts if _is_state_dict(each)}
    if entry is None and len(entries) == 1:
        (entry,) = entries
    if not entries:
        raise CSGError(f'{path}: no state dict; give a checkpoint')
    if entry not in entries:
        found = f'no state dict in the entry {entry!r}' if entry else 'several state dicts'
        raise CSGError(f'{path}: {found}; choose from --entry {", ".join(entries)}')
    return dict(entries[entry])


def _is_state_dict(content: Any) -> bool:
    return isinstance(content, dict) and bool(content) and all(isinstance(each, Tensor) for each in content.values())


def rename_in_order(given: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """Give tensors the names of another state dict of the same network, in order.

    The code of both must define its layers in the same order. Two tensors match if their shapes and the last parts of
    their names (``weight``, ``running_mean``) are the same; the tensors of a layer are those of one other layer. A bias
    that is only wanted is zero. Denormal numbers become zero: they are too small to matter, and arithmetic on them is
    many times slower on some CPUs.

    Args:
        given: the checkpoint's tensors.
        wanted: the network's state dict.

    Returns:
        a state dict for the network, and the names of the biases that were not given.

    Raises:
        CSGError: a tensor does not match.
    """
    names = [name for name in given if not name.endswith(COUNTER)]
    renamed, added, position = {}, [], 0
    sources: dict[str, str] = {}  # the checkpoint's layer of each layer
    for name, tensor in wanted.items():
        source = names[position] if position < len(names) else None
        layer = name.rpartition('.')[0]
        if name.endswith(COUNTER):
            renamed[name] = tensor
        elif (
            source is not None
            and _describe(source, given[source]) == _describe(name, tensor)
            and sources.setdefault(layer, source.rpartition('.')[0]) == source.rpartition('.')[0]
        ):
            renamed[name] = _without_denormals(given[source].to(tensor.dtype))
            position += 1
        elif name.endswith('.bias'):
            renamed[name] = torch.zeros_like(tensor)
            added.append(name)
        else:
            there = 'ends' if source is None else f'has {source} {tuple(given[source].shape)}'
            raise CSGError(
                f'the config has {name} {tuple(tensor.shape)} where the checkpoint {there}; '
                'give the config of the same network, with layers in the same order and names that end alike'
            )
    if position < len(names):
        raise CSGError(
            f'the checkpoint has {len(names) - position} tensors more than the config, the first {names[position]}; '
            'give the config of the same network'
        )
    return renamed, added


def _describe(name: str, tensor: Tensor) -> tuple:
    return name.rpartition('.')[2], tensor.shape


def _without_denormals(tensor: Tensor) -> Tensor:
    if not tensor.is_floating_point():
        return tensor
    return torch.where(tensor.abs() < torch.finfo(tensor.dtype).smallest_normal, 0, tensor)
