"""Write a compact checkpoint that contains its config's network and class names."""

import json
import logging
import os
from collections.abc import Mapping
from typing import Any

import mmengine
import torch
from mmengine.config import Config
from mmengine.logging import print_log
from torch import Tensor, nn

from csg_seg.errors import CSGError
from csg_seg.storage.compact import write_compact
from csg_seg.version import __version__

from .descriptions import describe


def write_with_config(
    model: nn.Module,
    state_dict: Mapping[str, Tensor],
    path: str | os.PathLike,
    cfg: Config,
    dataset_meta: Mapping[str, Any],
    *,
    dtype: str | None = None,
    notes: Mapping[str, str] | None = None,
    base: str | os.PathLike | None = None,
) -> None:
    """Write a compact checkpoint that can be loaded without its config.

    If the config names files, or holds values that JSON cannot, the network is left out, with a warning.

    Args:
        model: retrofitted.
        state_dict: of the model, or of an average of it.
        path: the file to write.
        cfg: the model's config.
        dataset_meta: its ``classes`` and ``palette`` are stored.
        dtype: as for :func:`csg_seg.save_compact`.
        notes: more text to store, by name.
        base: as for :func:`csg_seg.save_compact`.
    """
    try:
        source = describe(cfg)
    except CSGError as error:
        said = f'the compact checkpoint can only be loaded with its config ({error})'
        print_log(said, logger='current', level=logging.WARNING)
        source = None
    names = {key: dataset_meta[key] for key in ('classes', 'palette') if dataset_meta.get(key) is not None}
    versions = {'csg_seg': __version__, 'torch': torch.__version__, 'mmengine': mmengine.__version__}
    metadata = {**(notes or {}), 'dataset_meta': json.dumps(names), 'versions': json.dumps(versions)}
    write_compact(model, state_dict, path, dtype=dtype, source=source, metadata=metadata, base=base)
