"""Compact checkpoints of configs: written with all that it takes to build and use the network."""

import json
import logging
import os
from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

import mmengine
import torch
from mmengine.config import Config
from mmengine.logging import print_log
from mmengine.runner import Runner
from torch import Tensor, nn

from csg_seg.errors import CSGError
from csg_seg.files import write_whole
from csg_seg.layers.bank import find_bank
from csg_seg.mm.model import build_model
from csg_seg.report import summarise
from csg_seg.storage.compact import load_compact, write_compact
from csg_seg.version import __version__

from .reading import load_weights, read_checkpoint
from .registries import describe


def write_described(
    model: nn.Module,
    state_dict: Mapping[str, Tensor],
    path: str | os.PathLike,
    cfg: Config,
    dataset_meta: Mapping[str, Any],
    *,
    dtype: str = 'float32',
    notes: Mapping[str, str] | None = None,
) -> None:
    """Write a compact checkpoint with its config's network, its classes and the versions that made it.

    A config that names files of its own, or holds what JSON cannot, is left out, with a warning.

    Args:
        model: retrofitted.
        state_dict: of it, or of an average of it.
        path: of the file.
        cfg: the model's config.
        dataset_meta: of which ``classes`` and ``palette`` are kept.
        dtype: as for :func:`csg_seg.save_compact`.
        notes: to keep in the file too, text by name.
    """
    try:
        source = describe(cfg)
    except CSGError as error:
        said = f'the compact checkpoint will need its config to be loaded ({error})'
        print_log(said, logger='current', level=logging.WARNING)
        source = None
    names = {key: dataset_meta[key] for key in ('classes', 'palette') if dataset_meta.get(key) is not None}
    versions = {'csg_seg': __version__, 'torch': torch.__version__, 'mmengine': mmengine.__version__}
    metadata = {**(notes or {}), 'dataset_meta': json.dumps(names), 'versions': json.dumps(versions)}
    write_compact(model, state_dict, path, dtype=dtype, source=source, metadata=metadata)


def compact(cfg: Config, checkpoint: str | os.PathLike, out: str | os.PathLike, *, dtype: str) -> dict[str, Any]:
    """Write the compact checkpoint of a training checkpoint.

    Args:
        cfg: CSG config.
        checkpoint: of its training, or a compact one.
        out: the file to write.
        dtype: as for :func:`csg_seg.save_compact`.

    Returns:
        JSON-ready: ``dense_bytes`` of the dense network's state dict, ``compact_bytes`` of the file, their ratio.

    Raises:
        CSGError: the config is dense, the checkpoint is not its, or the file would not be smaller than the dense one.
    """
    model = build_model(cfg)
    if find_bank(model) is None:
        raise CSGError('the config is dense, and a compact checkpoint holds codes; give a CSG config')
    read = read_checkpoint(checkpoint)
    load_weights(model, read['state_dict'])
    dense = summarise(model).dense_bytes

    def write(partial: Path) -> None:
        write_described(model, model.state_dict(), partial, cfg, read['meta'].get('dataset_meta') or {}, dtype=dtype)
        if partial.stat().st_size >= dense:
            raise CSGError(
                f'the file would have {partial.stat().st_size:,} bytes and the dense network has {dense:,}; '
                'take another dtype, or settings that compress'
            )

    out = Path(out)
    write_whole(out, write)
    size = out.stat().st_size
    return {'dtype': dtype, 'dense_bytes': dense, 'compact_bytes': size, 'compression_ratio': dense / size}


@torch.no_grad()
def logit_error(
    cfg: Config, checkpoint: str | os.PathLike, path: str | os.PathLike, *, images: int
) -> dict[str, float]:
    """Compare a compact checkpoint's class scores with those of the checkpoint it was made from.

    Args:
        cfg: their config; its test images are taken.
        checkpoint: the original.
        path: the compact one.
        images: how many.

    Returns:
        ``logit_error``, the mean absolute difference, and ``logit_size``, the mean absolute value.
    """
    model = build_model(cfg).eval()
    load_weights(model, read_checkpoint(checkpoint)['state_dict'])
    twin = load_compact(path, build_model(cfg)).eval()
    loader = deepcopy(cfg.test_dataloader)
    loader.update(batch_size=1)
    differences, sizes = [], []
    for _, batch in zip(range(images), Runner.build_dataloader(loader), strict=False):
        inputs = model.data_preprocessor(batch)['inputs']
        one, two = (_logits(each(inputs, mode='tensor')) for each in (model, twin))
        differences.append((one - two).abs().mean())
        sizes.append(one.abs().mean())
    return {'logit_error': torch.stack(differences).mean().item(), 'logit_size': torch.stack(sizes).mean().item()}


def _logits(outputs: Any) -> Tensor:
    return outputs[0] if isinstance(outputs, (tuple, list)) else outputs
