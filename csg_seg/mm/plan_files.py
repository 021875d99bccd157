"""Plan a config: build its dense network, write the config of a plan, draw the trade-off curve."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter
from mmengine.config import Config
from torch import nn

from csg_seg.errors import CSGError, abridge
from csg_seg.mm.checkpoints.reading import load_weights, read_checkpoint
from csg_seg.mm.config_parts import config_hooks
from csg_seg.mm.figures import save_figure
from csg_seg.mm.model import build_model
from csg_seg.planning.planner import Plan, Point, predict

# The settings for small and for large networks in Omidvar et al., AISTATS 2021.
PAPER = {
    "paper's s12 d72": dict(slice_shape=(12, 12, 3, 3), code_dim=72),
    "paper's s16 d128": dict(slice_shape=(16, 16, 3, 3), code_dim=128),
}


def build_dense(cfg: Config, checkpoint: str | os.PathLike | None) -> nn.Module:
    """Build the network of a dense config; without a checkpoint its weights are untrained.

    Raises:
        FileNotFoundError: there is no such checkpoint.
        CSGError: the config is a CSG config, or the checkpoint does not fit it.
    """
    if cfg.model.type == 'CSGModel' or any(hook.get('csg') for hook in config_hooks(cfg)):
        raise CSGError('a plan starts from a dense network and this is a CSG config; give the dense config')
    if checkpoint is None:
        torch.manual_seed(0)  # makes a plan of untrained weights reproducible
        return build_model(cfg)
    state_dict = read_checkpoint(checkpoint)['state_dict']
    model = build_model(cfg)
    load_weights(model, state_dict)
    return model


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
    csg = write_csg(plan.csg)
    return (
        f'# {plan.stored_params:,} parameters for {plan.dense_params:,} dense: {plan.compression_ratio:.2f}x smaller, '
        f'{plan.stored_bytes:,} bytes; predicted relative error{of} {plan.relative_error:.3f}.\n'
        f'_base_ = {_base(Path(dense), Path(out))!r}\n'
        f'custom_imports = dict(imports={list(dict.fromkeys(imports))!r})\n'
        f"model = dict(\n    type='CSGModel',\n    base_type={{{{_base_.model.type}}}},\n    {csg},\n)\n"
        "default_hooks = dict(csg=dict(type='CSGHook', save_compact=True))\n"
    )


def write_csg(csg: Sequence[Mapping[str, Any]]) -> str:
    """Write ``csg`` as the argument of a model in a config."""
    return 'csg=[\n' + ''.join(f'        dict({_arguments(each)}),\n' for each in csg) + '    ]'


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


def mark_settings(model: nn.Module, settings: Mapping[str, Any] = PAPER) -> dict[str, Point]:
    """Return a point for each of the given settings that fits the network and compresses it.

    Args:
        model: a dense network.
        settings: csg dicts by the name to show.
    """
    marks = {}
    for name, csg in settings.items():
        try:
            each = predict(model, csg)
        except CSGError:
            continue
        if each.compression_ratio > 1:
            marks[name] = Point(each.stored_params, each.compression_ratio, each.relative_error)
    return marks


def draw_curve(curve: Sequence[Point], marks: Mapping[str, Point], path: str | os.PathLike, *, title: str) -> None:
    """Save a picture of the predicted error against the compression ratio.

    Args:
        curve: the curve of a plan.
        marks: more points to show, by name.
        path: the picture to write; its ending selects the format.
        title: name of the network.
    """
    figure = Figure(figsize=(7, 4.5), layout='constrained')
    axis = figure.subplots()
    dense = curve[-1].stored_params * curve[-1].compression_ratio
    axis.plot(
        [each.compression_ratio for each in curve], [each.relative_error for each in curve], label='planned', zorder=2
    )
    for (name, mark), marker in zip(marks.items(), 'osD^v', strict=False):
        label = f'{name}: {mark.compression_ratio:.2f}x, error {mark.relative_error:.2f}'
        axis.plot(mark.compression_ratio, mark.relative_error, marker, markersize=8, label=label, zorder=3)
    axis.set_xscale('log')
    axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.xaxis.set_major_formatter(FuncFormatter(lambda ratio, _: f'{ratio:g}x'))
    axis.xaxis.set_minor_formatter(NullFormatter())
    axis.set_xlim(1, max(each.compression_ratio for each in [*curve, *marks.values()]) * 1.05)
    axis.set_ylim(0, 1.02)
    axis.set_xlabel('compression ratio, dense parameters / stored parameters')
    axis.set_ylabel("predicted relative error of the convs, |W - W'| / |W|")
    axis.set_title(f'{title}: {dense / 1e6:.2f} M parameters dense')
    axis.grid(which='both', alpha=0.3)
    axis.legend(loc='lower right')
    save_figure(figure, path)
