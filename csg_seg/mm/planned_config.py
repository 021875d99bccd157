"""From a dense config and its checkpoint to a plan, and to the config that it makes."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from torch import nn

from csg_seg.errors import CSGError, abridge
from csg_seg.mm.checkpoints.reading import load_weights, read_checkpoint
from csg_seg.planning.planner import Plan

from .model import build_model


def build_dense(cfg: Config, checkpoint: str | os.PathLike | None) -> nn.Module:
    """Build the network of a dense config; without a checkpoint its weights are untrained.

    Raises:
        FileNotFoundError: there is no such checkpoint.
        CSGError: the config is no dense one, or the checkpoint does not fit it.
    """
    hooks = [*cfg.get('default_hooks', {}).values(), *cfg.get('custom_hooks', [])]
    if cfg.model.type == 'CSGModel' or any(hook and hook.get('csg') for hook in hooks):
        raise CSGError('a plan starts from a dense network and this is a CSG config; give the dense config')
    state_dict = read_checkpoint(checkpoint)['state_dict'] if checkpoint else None
    if state_dict is None:
        torch.manual_seed(0)  # so that a plan of untrained weights can be repeated
    model = build_model(cfg)
    if state_dict is not None:
        load_weights(model, state_dict)
    return model


def planned_config(plan: Plan, dense: str | os.PathLike, cfg: Config, out: str | os.PathLike, *, trained: bool) -> str:
    """Return the text of a config that inherits from the dense one and retrofits it as planned.

    Args:
        plan: of the dense config's network.
        dense: path of the dense config.
        cfg: what it holds.
        out: path that the text is for, which the base is named from.
        trained: whether the network's weights were.
    """
    of = '' if trained else ' of UNTRAINED weights'
    imports = [*cfg.get('custom_imports', {}).get('imports', []), 'csg_seg']
    dicts = ''.join(f'        dict({_arguments(each)}),\n' for each in plan.csg)
    return (
        f'# {plan.stored_params:,} parameters for {plan.dense_params:,} dense: {plan.compression_ratio:.2f}x smaller, '
        f'{plan.stored_bytes:,} bytes; predicted relative error{of} {plan.relative_error:.3f}.\n'
        f'_base_ = {_base(Path(dense), Path(out))!r}\n'
        f'custom_imports = dict(imports={list(dict.fromkeys(imports))!r})\n'
        f"model = dict(\n    type='CSGModel',\n    base_type={{{{_base_.model.type}}}},\n    csg=[\n{dicts}    ],\n)\n"
        "default_hooks = dict(csg=dict(type='CSGHook', save_compact=True))\n"
    )


def _arguments(csg: Mapping[str, Any]) -> str:
    values = {key: tuple(value) if key == 'slice_shape' else value for key, value in csg.items()}
    return ', '.join(f'{key}={value!r}' for key, value in values.items())


def _base(dense: Path, out: Path) -> str:
    dense, folder = dense.resolve(), out.resolve().parent
    try:
        return Path(os.path.relpath(dense, folder)).as_posix()
    except ValueError:  # another drive
        return dense.as_posix()


def describe_layers(csg: Mapping[str, Any]) -> str:
    """Say in a few words which layers a dict of settings takes."""
    if csg.get('include'):
        return abridge(csg['include'])
    without = f', without {abridge(csg["exclude"])}' if csg.get('exclude') else ''
    return 'all of this kernel' + without
