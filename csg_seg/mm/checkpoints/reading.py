"""Checkpoints as mmengine reads and writes them."""

import json
import os
from pathlib import Path
from typing import Any

import torch
from mmengine.runner import CheckpointLoader
from mmengine.runner.checkpoint import load_state_dict
from torch import nn

from csg_seg.errors import CSGError, abridge
from csg_seg.layers.bank import find_bank
from csg_seg.layers.conv import check_finite
from csg_seg.storage.format import read_compact

from .unpickling import check_file, read_tensors


@CheckpointLoader.register_scheme(prefixes=r'.*\.safetensors$')
def load_from_compact(filename: str, map_location: Any = None) -> dict:
    """Let ``load_from``, ``init_model`` and the test tools read compact checkpoints.

    Raises:
        CSGError: the file is damaged or is no compact checkpoint.
    """
    compact = read_compact(filename)
    meta = {key: json.loads(text) for key, text in compact.metadata.items() if key == 'dataset_meta' and text != '{}'}
    return {'meta': meta, 'state_dict': compact.tensors}


def read_checkpoint(path: str | os.PathLike) -> dict:
    """Read a checkpoint of mmengine or a compact one, unpickling nothing but tensors and its scalars.

    Returns:
        a dict of ``state_dict`` and ``meta``.

    Raises:
        FileNotFoundError: there is no such file.
        CSGError: the file is damaged, or holds other objects.
    """
    check_file(path)
    if Path(path).suffix == '.safetensors':
        return load_from_compact(str(path))
    checkpoint = read_tensors(path)
    if not isinstance(checkpoint, dict):
        raise CSGError(f'{path}: holds a {type(checkpoint).__name__}, not a state dict; give a training checkpoint')
    state_dict = checkpoint.get('state_dict', checkpoint)
    return {'meta': checkpoint.get('meta', {}), 'state_dict': state_dict}


def load_weights(model: nn.Module, state_dict: dict) -> None:
    """Load a whole state dict into a bare model, strictly.

    Raises:
        CSGError: names or shapes differ, a value is not finite, or the weights are dense and the model is retrofitted.
    """
    if find_bank(model) is not None and not any(name.endswith('.code') for name in state_dict):
        raise CSGError(
            'a dense checkpoint, and the config is a CSG config: use it with the dense config, '
            'or train this config from it (load_from)'
        )
    for name, tensor in state_dict.items():
        if isinstance(tensor, torch.Tensor) and tensor.is_floating_point():
            check_finite(name, tensor)
    wanted = model.state_dict()
    missing, excess = ([*one.keys() - other.keys()] for one, other in ((wanted, state_dict), (state_dict, wanted)))
    wrong = [f'{name} is missing' for name in sorted(missing)] + [f'{name} is in excess' for name in sorted(excess)]
    if wrong:
        raise CSGError(f'the checkpoint does not fit the config: {abridge(wrong)}; {_hint(model, state_dict)}')
    try:
        load_state_dict(model, state_dict, strict=True)
    except RuntimeError as error:
        raise CSGError(f'the checkpoint does not fit the config: {" ".join(str(error).split())[:300]}') from None


def _hint(model: nn.Module, state_dict: dict) -> str:
    """Guess what a state dict with other names is."""
    if find_bank(model) is None and any(name.endswith('.code') for name in state_dict):
        return 'it is a CSG checkpoint; use its CSG config, or materialise it'
    if all(name.startswith('module.') for name in state_dict):
        return "its names begin with 'module.'; released files are converted by tools/model_converters/released2csg.py"
    return 'take a checkpoint of this config'
