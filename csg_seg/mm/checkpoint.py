"""Checkpoints as mmengine reads and writes them."""

import json
import os
import re
import zipfile
from collections.abc import Callable, Mapping
from functools import wraps
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import mmengine.runner.checkpoint
import numpy as np
import torch
from mmengine.logging import HistoryBuffer
from mmengine.runner import CheckpointLoader
from mmengine.runner.checkpoint import load_state_dict
from torch import nn

from ..bank import BANK, find_bank, find_roots
from ..checkpoint import read_compact
from ..conv import check_finite, generated_convs
from ..errors import CSGError, abridge
from ..generator import read_layers

REORDERED = 'csg_generators_first'
GENERATOR = re.compile(rf'(^|\.){BANK}\.\d+\._extra_state$')


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


def read_tensors(path: str | os.PathLike, map_location: Any = 'cpu') -> Any:
    """Load a file of ``torch.save``, unpickling nothing but tensors, containers and mmengine's scalars.

    Raises:
        CSGError: the file is damaged, or holds other objects.
    """
    try:
        # Again, because mmengine's own loading may have cleared what is registered below.
        with torch.serialization.safe_globals(_what_mmengine_pickles()):
            return torch.load(path, map_location=map_location, weights_only=True)
    except UnpicklingError:
        raise CSGError(
            f'{path}: damaged, no checkpoint, or one with objects other than weights in it, which are not unpickled; '
            'give a checkpoint of a training run'
        ) from None
    # A damaged file may raise anything while it is parsed.
    except Exception as error:
        raise CSGError(f'{path}: damaged, or no checkpoint ({type(error).__name__}); copy it again') from None


def forbid_unpickling() -> None:
    """Let mmengine load local checkpoints by :func:`read_tensors` alone, in this process.

    Its own loader unpickles whatever a file holds when safe loading is refused.
    """

    @CheckpointLoader.register_scheme(prefixes='', force=True)
    def load_from_local(filename: str, map_location: Any = None) -> Any:
        check_file(filename)
        return read_tensors(filename, map_location)


def check_file(path: str | os.PathLike) -> None:
    """Refuse a checkpoint that is missing, empty or cut short, before anything else is done.

    Raises:
        FileNotFoundError: there is no such file.
        CSGError: the file is cut short.
    """
    if '://' in str(path):
        raise CSGError(f'{path}: no local file; download it first')
    path = Path(path)
    if path.is_dir():
        raise CSGError(f'{path}: a folder; give a file in it')
    if not path.is_file():
        raise FileNotFoundError(f'{path}: no such file; give the checkpoint of a training run')
    with path.open('rb') as file:
        start = file.read(2)
    if len(start) < 2 or (start == b'PK' and not zipfile.is_zipfile(path)):
        raise CSGError(f'{path}: damaged, it is cut short; copy it again')
    if path.suffix == '.safetensors':
        read_compact(path)


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


def check_kind(model: nn.Module, state_dict: Mapping[str, Any]) -> None:
    """Refuse codes for layers that are dense in a model, which mmengine would leave random.

    Args:
        model: a network or a part of one.
        state_dict: about to be loaded into it.

    Raises:
        CSGError: the state dict holds generators and the model has no generated layer, or it holds codes of a layer
            of which the model wants the weight.
    """
    own = model.state_dict().keys()
    foreign = [name for name in state_dict if name not in own]
    generators = [name for name in foreign if GENERATOR.search(name)]
    if generators and not any(generated_convs(model)):
        raise CSGError(
            f'the checkpoint holds codes and a generator ({generators[0]}) but the config is dense, or has its csg in '
            'CSGHook, which a Runner alone runs; use a config with CSGModel, or materialise the checkpoint first '
            '(tools/materialise.py)'
        )
    if any(find_roots(model)):  # a root looks at codes itself
        return
    for name in foreign:
        weight = f'{name.removesuffix("code")}weight'
        if name.endswith('.code') and weight in own and weight not in state_dict:
            raise CSGError(
                f'the checkpoint holds {name}, and this layer is dense in the model, or loaded without its generator; '
                "set the config's csg to the checkpoint's and load it as a whole, or materialise it first"
            )


def _refuse_codes(load: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(load)
    def load_state_dict(module: nn.Module, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        check_kind(module, state_dict)
        return load(module, state_dict, *args, **kwargs)

    return load_state_dict


# Whatever loads checkpoints for mmengine ends there: Runner, init_model, inferencers.
mmengine.runner.checkpoint.load_state_dict = _refuse_codes(load_state_dict)


def put_generators_first(checkpoint: dict, model: nn.Module) -> None:
    """Reorder, once, the optimizer's state of a run of csg_seg 0.1.0, in which the generators' parameters came last.

    Args:
        checkpoint: of a training that is resumed, changed in place.
        model: retrofitted.

    Raises:
        CSGError: its parameter groups do not say which parameter is which.
    """
    settings = checkpoint.get('state_dict', {}).get(f'{BANK}.0._extra_state')
    groups = checkpoint.get('optimizer', {}).get('param_groups')
    if settings is None or not groups or read_layers(settings) is not None or REORDERED in checkpoint:
        return
    checkpoint[REORDERED] = True
    single = len(groups) == 1
    # mmengine makes no group for a frozen parameter.
    names = [name for name, each in model.named_parameters() if single or each.requires_grad]
    earlier = sorted(names, key=lambda name: name.startswith(f'{BANK}.'))
    items = groups[0]['params'] if single else groups
    if len(items) != len(names) or not (single or all(len(group['params']) == 1 for group in groups)):
        raise CSGError(
            'a run of csg_seg 0.1.0, whose optimizer state has another order, with groups of several parameters; '
            'begin a new run with its weights (load_from, without --resume)'
        )
    place = {name: position for position, name in enumerate(earlier)}
    items[:] = [items[place[name]] for name in names]


def _hint(model: nn.Module, state_dict: dict) -> str:
    """Guess what a state dict with other names is."""
    if find_bank(model) is None and any(name.endswith('.code') for name in state_dict):
        return 'it is a CSG checkpoint; use its CSG config, or materialise it'
    if all(name.startswith('module.') for name in state_dict):
        return "its names begin with 'module.'; released files are converted by tools/model_converters/released2csg.py"
    return 'take a checkpoint of this config'


def _what_mmengine_pickles() -> list:
    multiarray = np._core.multiarray if hasattr(np, '_core') else np.core.multiarray
    dtypes = [
        type(np.dtype(each)) for each in (np.float32, np.float64, np.int32, np.int64, np.uint32, np.uint8, np.bool_)
    ]
    known = [HistoryBuffer, np.ndarray, np.dtype, multiarray._reconstruct, multiarray.scalar, slice, *dtypes]
    return [*known, (_history_statistic, 'builtins.getattr')]


def _history_statistic(owner: Any, name: str) -> Any:
    """Stand in for ``getattr``, which a HistoryBuffer is pickled with: its own methods and nothing else."""
    if owner is not HistoryBuffer or name.startswith('_'):
        raise UnpicklingError(f'{name} of {owner} is not a statistic of mmengine')
    return getattr(owner, name)


# Also lets OpenMMLab's mmengine, whose own loading stops at these, resume and test on torch 2.6 and later.
torch.serialization.add_safe_globals(_what_mmengine_pickles())
