"""Read training checkpoints and compact checkpoints, and load their weights strictly."""

import json
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from mmengine.runner import CheckpointLoader
from mmengine.runner.checkpoint import load_state_dict
from torch import nn

from csg_seg.errors import CSGError, abridge
from csg_seg.generators.settings import Settings
from csg_seg.generators.signature import VALUE, read_layers, read_signature
from csg_seg.layers.bank import BANK, find_bank
from csg_seg.layers.conv import check_finite, generated_convs
from csg_seg.storage.format import read_compact

from .unpickling import check_file, read_tensors

GENERATOR = re.compile(rf'(^|\.){BANK}\.\d+\._extra_state$')


@CheckpointLoader.register_scheme(prefixes=r'.*\.safetensors$')
def load_from_compact(filename: str, map_location: Any = None) -> dict:
    """Read a compact checkpoint, also for mmengine's ``load_from``, ``init_model`` and test tools.

    Raises:
        CSGError: the file is damaged, or not a compact checkpoint.
    """
    compact = read_compact(filename)
    dataset_meta = json.loads(compact.metadata.get('dataset_meta', '{}'))
    return {'meta': {'dataset_meta': dataset_meta} if dataset_meta else {}, 'state_dict': compact.tensors}


def read_checkpoint(path: str | os.PathLike) -> dict:
    """Read a training checkpoint or a compact checkpoint, without unpickling objects.

    Returns:
        A dict with ``state_dict`` and ``meta``.

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
    return {'meta': checkpoint.get('meta', {}), 'state_dict': checkpoint.get('state_dict', checkpoint)}


def read_csg(path: str | os.PathLike) -> list[dict[str, Any]]:
    """Return the ``csg`` of a checkpoint's network, without the keys that have their defaults.

    A training checkpoint holds the names of the layers instead of ``include`` and ``exclude``, and does not say
    whether a generator is frozen.

    Raises:
        FileNotFoundError: there is no such file.
        CSGError: the file is damaged, or not of a CSG network.
    """
    if Path(path).suffix == '.safetensors':
        check_file(path)
        return [each.to_csg(position) for position, each in enumerate(read_compact(path).settings)]
    entries = read_checkpoint(path)['state_dict']
    nested = [each for each in entries.values() if isinstance(each, Mapping)]  # in a program's own checkpoint
    states = ([each[name] for name in generator_names(map(str, each))] for each in (entries, *nested))
    first = next(filter(None, states), None)  # not those of an average too
    if first is None:
        raise CSGError(f'{path}: not a checkpoint of a CSG network')
    found = []
    for position, state in enumerate(first):
        csg = {key: each for key, each in read_signature(state).items() if key != VALUE}
        layers = read_layers(state)
        settings = Settings.from_dict({**csg, 'include': None if layers is None else [*layers]}, position=position)
        found.append(settings.to_csg(position))
    return found


def generator_names(names: Iterable[str]) -> list[str]:
    """Return the state-dict entries that hold a generator's settings, one for each generator."""
    return [name for name in names if GENERATOR.search(name)]


def load_weights(model: nn.Module, state_dict: dict) -> None:
    """Load a whole state dict into a model that is not wrapped, strictly.

    Raises:
        CSGError: names or shapes differ, a value is not finite, or the weights are dense and the model is retrofitted.
    """
    if find_bank(model) is not None and not any(name.endswith('.code') for name in state_dict):
        raise CSGError(
            'a dense checkpoint, and the config is a CSG config: use it with the dense config, '
            'or train this config from it (load_from)'
        )
    if find_bank(model) is None and generator_names(state_dict):
        raise CSGError('a CSG checkpoint, and the config is dense; use its CSG config, or materialise the checkpoint')
    for name, tensor in state_dict.items():
        if isinstance(tensor, torch.Tensor) and tensor.is_floating_point():
            check_finite(name, tensor)
    wanted, given = model.state_dict().keys(), state_dict.keys()
    wrong = [f'{name} is missing' for name in sorted(wanted - given)]
    wrong += [f'{name} is in excess' for name in sorted(given - wanted)]
    if wrong:
        raise CSGError(f'the checkpoint does not fit the config: {abridge(wrong)}; {_hint(model, state_dict)}')
    try:
        load_state_dict(model, state_dict, strict=True)
    except RuntimeError as error:
        raise CSGError(f'the checkpoint does not fit the config: {" ".join(str(error).split())[:300]}') from None


def check_weights(model: nn.Module, state_dict: Mapping[str, Any], *, complete: bool) -> None:
    """Check that a checkpoint fits a model: mmengine loads what fits, and leaves the rest random.

    A retrofitted model checks codes and generators itself.

    Args:
        model: not wrapped.
        state_dict: about to be loaded.
        complete: whether it must have all weights, as for a test; otherwise one is enough, as for a training.

    Raises:
        CSGError: weights are missing or have other shapes.
    """
    given = {name.removeprefix('module.'): each for name, each in state_dict.items()}
    convs = dict(generated_convs(model, remove_duplicate=False))
    own = {f'{name}.{key}' for name, conv in convs.items() for key in conv.stored()}
    wanted = {
        name: each.shape
        for name, each in model.state_dict().items()
        if each.is_floating_point() and name not in own and name.split('.')[0] != BANK
    }
    if not generator_names(given) and not own & given.keys():
        wanted |= {f'{name}.weight': conv.weight_shape for name, conv in convs.items()}
    wrong = [f'{name} is missing' for name in wanted if name not in given]
    wrong += [
        f'{name} is {tuple(given[name].shape)} instead of {tuple(shape)}'
        for name, shape in wanted.items()
        if name in given and given[name].shape != shape
    ]
    if wrong and (complete or len(wrong) == len(wanted)):
        raise CSGError(f'the checkpoint does not fit the config: {abridge(wrong)}; {_hint(model, given)}')


def _hint(model: nn.Module, state_dict: Mapping[str, Any]) -> str:
    """Say what to do about a state dict with other names."""
    if all(name.startswith('module.') for name in state_dict):
        return "its names begin with 'module.'; released files are converted by tools/model_converters/released2csg.py"
    if not model.state_dict().keys() & state_dict.keys():
        return (
            'no name is the same: if other code wrote it for the same network, '
            'tools/model_converters/rename_weights.py renames its tensors'
        )
    return 'use a checkpoint of this config'
