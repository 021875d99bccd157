"""Trained weights rounded to 8 bits, by the same rule for all methods."""

import tempfile
from pathlib import Path

import torch
from mmengine.config import Config
from safetensors.torch import save_file

from csg_seg.files import write_whole
from csg_seg.mm.checkpoints.reading import load_weights, read_checkpoint
from csg_seg.mm.model import build_model
from csg_seg.storage.format import is_counter, is_setting
from csg_seg.storage.precision import lower, restore


def write_rounded(cfg: Config, checkpoint: str, out: Path) -> int:
    """Write the checkpoint that an int8 file gives back.

    Parameters of two or more dimensions are rounded, each row with a scale of its own, as compact files do it.

    Args:
        cfg: of the network.
        checkpoint: of its training.
        out: the file to write (.pth), with the rounded values in float32.

    Returns:
        the bytes of the int8 file.
    """
    model = build_model(cfg)
    load_weights(model, read_checkpoint(checkpoint)['state_dict'])
    state_dict = model.state_dict()
    matrices = [name for name, parameter in model.named_parameters() if parameter.ndim > 1]
    stored = {name: each for name, each in state_dict.items() if not (is_setting(name) or is_counter(name))}
    lowered = lower(stored, matrices, 'int8')
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, 'int8.safetensors')
        save_file({name: each.contiguous() for name, each in lowered.items()}, file)
        size = file.stat().st_size
    rounded = {'state_dict': {**state_dict, **restore(lowered)}}
    write_whole(out, lambda partial: torch.save(rounded, partial))
    return size
