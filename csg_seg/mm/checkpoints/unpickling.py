"""Load pickled checkpoints safely: which objects may be unpickled, and the loader that replaces mmengine's.

Unpickling can run any code, so a file may contain only tensors, plain containers and the
few objects that mmengine puts into its checkpoints. mmengine's own loader falls back to
unpickling everything; :func:`forbid_unpickling` replaces it.
"""

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
    """Load a file written by ``torch.save`` without unpickling any other objects than those allowed.

    Raises:
        CSGError: the file is damaged, or holds other objects.
    """
    try:
        # Registered again, because mmengine's loader may have cleared the registration at import.
        with torch.serialization.safe_globals(_safe_objects()):
            return torch.load(path, map_location=map_location, weights_only=True)
    except UnpicklingError:
        raise CSGError(
            f'{path}: damaged, not a checkpoint, or it holds objects other than weights, which are not unpickled; '
            'give a checkpoint of a training run'
        ) from None
    # Parsing a damaged file may raise anything.
    except Exception as error:
        raise CSGError(f'{path}: damaged, or not a checkpoint ({type(error).__name__}); copy it again') from None


def forbid_unpickling() -> None:
    """Make mmengine load local checkpoints with :func:`read_tensors` in this process."""

    @CheckpointLoader.register_scheme(prefixes='', force=True)
    def load_from_local(filename: str, map_location: Any = None) -> Any:
        check_file(filename)
        return read_tensors(filename, map_location)


def check_file(path: str | os.PathLike) -> None:
    """Refuse a checkpoint that is missing, empty or cut short, without loading it.

    Raises:
        FileNotFoundError: there is no such file.
        CSGError: the file is cut short, or the path is an address or a folder.
    """
    if '://' in str(path):
        raise CSGError(f'{path}: not a local file; download it first')
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


def _safe_objects() -> list:
    """Return the classes and functions that mmengine's checkpoints refer to."""
    # NumPy pickles arrays and scalars with these two functions, whose module depends on its version.
    reconstruct, scalar = np.empty(0).__reduce__()[0], np.float32(0).__reduce__()[0]
    dtypes = [type(np.dtype(each)) for each in ('f4', 'f8', 'i4', 'i8', 'u4', 'u1', '?')]
    known = [HistoryBuffer, np.ndarray, np.dtype, reconstruct, scalar, slice, *dtypes]
    return [*known, (_history_statistic, 'builtins.getattr')]


def _history_statistic(owner: Any, name: str) -> Any:
    """Replace ``getattr``, which a pickled HistoryBuffer calls, and allow only the buffer's own methods."""
    if owner is not HistoryBuffer or name.startswith('_'):
        raise UnpicklingError(f'{name} of {owner} is not a statistic of mmengine')
    return getattr(owner, name)


# OpenMMLab's mmengine needs these to resume and test with torch 2.6 and later.
torch.serialization.add_safe_globals(_safe_objects())
