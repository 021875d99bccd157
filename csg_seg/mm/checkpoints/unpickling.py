"""Checkpoint files, read without unpickling objects."""

import os
import zipfile
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import numpy as np
import torch
from mmengine.logging import HistoryBuffer
from mmengine.runner import CheckpointLoader

from csg_seg.errors import CSGError
from csg_seg.storage.format import read_compact


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
