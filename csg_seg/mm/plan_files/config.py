"""Write the config of a plan."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmengine.config import Config

from csg_seg.errors import abridge
from csg_seg.planning.planner import Plan


def planned_config(plan: Plan, dense: str | os.PathLike, cfg: Config, out: str | os.PathLike, *, trained: bool) -> str:
    """Return the text of a config that inherits from a dense config and retrofits its network as planned.

    Args:
        plan: the plan for the dense config's network.
        dense: path of the dense config.
        cfg: the dense config.
        out: path of the new config; the path of its base is relative to it.
        trained: whether the plan was made for trained weights.
    """
    of = '' if trained else ' of UNTRAINED weights'
    imports = [*cfg.get('custom_imports', {}).get('imports', []), 'csg_seg.mm']
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
    except ValueError:  # on another drive
        return dense.as_posix()


def describe_layers(csg: Mapping[str, Any]) -> str:
    """Describe in a few words which layers a csg dict generates."""
    if csg.get('include'):
        return abridge(csg['include'])
    without = f', without {abridge(csg["exclude"])}' if csg.get('exclude') else ''
    return 'all with this kernel' + without
