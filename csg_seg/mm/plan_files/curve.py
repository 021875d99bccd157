"""Draw the predicted error of a network against its compression ratio."""

import os
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter
from torch import nn

from csg_seg.errors import CSGError
from csg_seg.mm.figures import save_figure
from csg_seg.planning.planner import Point, predict

# The settings for small and for large networks in Omidvar et al., AISTATS 2021.
PAPER = {
    "paper's s12 d72": dict(slice_shape=(12, 12, 3, 3), code_dim=72),
    "paper's s16 d128": dict(slice_shape=(16, 16, 3, 3), code_dim=128),
}


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
