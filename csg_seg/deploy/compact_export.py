"""Make a compact checkpoint from a training checkpoint, and measure what its precision costs."""

import os
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from mmengine.runner import Runner
from torch import Tensor

from csg_seg.errors import CSGError
from csg_seg.files import write_whole
from csg_seg.layers.bank import find_bank
from csg_seg.mm.checkpoints.reading import load_weights, read_checkpoint
from csg_seg.mm.checkpoints.writing import write_with_config
from csg_seg.mm.model import build_model
from csg_seg.report import summarise
from csg_seg.storage.compact import load_compact
from csg_seg.storage.format import read_content


def compact(
    cfg: Config,
    checkpoint: str | os.PathLike,
    out: str | os.PathLike,
    *,
    dtype: str | None = None,
    base: str | os.PathLike | None = None,
) -> dict[str, Any]:
    """Write the compact checkpoint of a training checkpoint.

    Args:
        cfg: a CSG config.
        checkpoint: of the config's training, or a compact checkpoint.
        out: the file to write.
        dtype: as for :func:`csg_seg.save_compact`.
        base: as for :func:`csg_seg.save_compact`.

    Returns:
        ``dtype``, ``dense_bytes`` of the dense network's state dict, ``compact_bytes`` of the file, and
        ``compression_ratio``, the first over the second; of an update also ``base_bytes``, and the ratio is that of
        both files together. They can be written as JSON.

    Raises:
        CSGError: the config is dense, the checkpoint does not fit it, or the file would not be smaller than the
            dense network.
    """
    if base is not None and Path(out).exists() and Path(out).samefile(base):
        raise CSGError(f'{out}: the update would replace its base; choose another path')
    model = build_model(cfg)
    if find_bank(model) is None:
        raise CSGError('the config is dense, and a compact checkpoint holds codes; give a CSG config')
    read = read_checkpoint(checkpoint)
    load_weights(model, read['state_dict'])
    dense = summarise(model).dense_bytes

    def write(partial: Path) -> None:
        dataset_meta = read['meta'].get('dataset_meta') or {}
        write_with_config(model, model.state_dict(), partial, cfg, dataset_meta, dtype=dtype, base=base)
        if partial.stat().st_size >= dense:
            raise CSGError(
                f'the file would have {partial.stat().st_size:,} bytes and the dense network has {dense:,}; '
                'use another dtype, or settings that compress'
            )

    out = Path(out)
    write_whole(out, write)
    size, dtype = out.stat().st_size, read_content(out, base).header['dtype']
    found = {'dtype': dtype, 'dense_bytes': dense, 'compact_bytes': size, 'compression_ratio': dense / size}
    if base is not None:
        whole = Path(base).stat().st_size
        found |= {'base_bytes': whole, 'compression_ratio': dense / (size + whole)}
    return found


@torch.no_grad()
def logit_error(
    cfg: Config,
    checkpoint: str | os.PathLike,
    path: str | os.PathLike,
    *,
    images: int,
    base: str | os.PathLike | None = None,
) -> dict[str, float]:
    """Compare a compact checkpoint's class scores with those of the checkpoint it was made from.

    Args:
        cfg: the config of both, whose test images are used.
        checkpoint: the original.
        path: the compact checkpoint.
        images: number of images.
        base: of an update, as for :func:`csg_seg.load_compact`.

    Returns:
        ``logit_error``, the mean absolute difference, and ``logit_size``, the mean absolute value.
    """
    model = build_model(cfg).eval()
    load_weights(model, read_checkpoint(checkpoint)['state_dict'])
    loaded = load_compact(path, build_model(cfg), base=base).eval()
    loader = deepcopy(cfg.test_dataloader)
    loader.update(batch_size=1)
    differences, sizes = [], []
    for _, batch in zip(range(images), Runner.build_dataloader(loader), strict=False):
        inputs = model.get_submodule('data_preprocessor')(batch)['inputs']
        original, compacted = (_logits(each(inputs, mode='tensor')) for each in (model, loaded))
        differences.append((original - compacted).abs().mean())
        sizes.append(original.abs().mean())
    return {'logit_error': torch.stack(differences).mean().item(), 'logit_size': torch.stack(sizes).mean().item()}


def _logits(outputs: Any) -> Tensor:
    return outputs[0] if isinstance(outputs, (tuple, list)) else outputs
