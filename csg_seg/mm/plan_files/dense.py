"""Build the network of a dense config with its trained weights."""

import os

import torch
from mmengine.config import Config
from torch import nn

from csg_seg.errors import CSGError
from csg_seg.mm.checkpoints.reading import load_weights, read_checkpoint
from csg_seg.mm.model import build_model


def build_dense(cfg: Config, checkpoint: str | os.PathLike | None) -> nn.Module:
    """Build the network of a dense config; without a checkpoint its weights are untrained.

    Raises:
        FileNotFoundError: there is no such checkpoint.
        CSGError: the config is a CSG config, or the checkpoint does not fit it.
    """
    hooks = [*cfg.get('default_hooks', {}).values(), *cfg.get('custom_hooks', [])]
    if cfg.model.type == 'CSGModel' or any(hook and hook.get('csg') for hook in hooks):
        raise CSGError('a plan starts from a dense network and this is a CSG config; give the dense config')
    if checkpoint is None:
        torch.manual_seed(0)  # makes a plan of untrained weights reproducible
        return build_model(cfg)
    state_dict = read_checkpoint(checkpoint)['state_dict']
    model = build_model(cfg)
    load_weights(model, state_dict)
    return model
