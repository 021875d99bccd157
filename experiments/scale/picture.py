"""Picture of seconds and memory over the number of parameters."""

import os
from collections.abc import Mapping
from typing import Any

from matplotlib.figure import Figure

from csg_seg.mm.figures import save_figure

from .costs import PHASES


def draw_scale(results: Mapping[str, Mapping[str, Any]], path: str | os.PathLike) -> None:
    """Save a picture of seconds and memory over parameters.

    Args:
        results: result of :func:`experiments.scale.costs.measure_scale`.
        path: file of the picture (.png).
    """
    figure = Figure(figsize=(10, 4), layout='constrained')
    times, memory = figure.subplots(1, 2)
    rows = sorted(results.values(), key=lambda row: row['params'])
    millions = [row['params'] / 1e6 for row in rows]
    for phase, marker in zip(PHASES, 'os^Dv', strict=True):
        times.plot(millions, [row['seconds'][phase] for row in rows], marker, label=phase)
    for key, marker in (('peak_bytes', 'o'), ('dense_bytes', 's'), ('compact_bytes', '^')):
        memory.plot(millions, [row[key] / 1e6 for row in rows], marker, label=key.replace('_', ' '))
    for axis, label, start in ((times, 'seconds', 0.05), (memory, 'MB', 4)):
        if len(rows) > 1:
            axis.plot(millions, [start * each for each in millions], '--', color='gray', label='linear', zorder=0)
        axis.set_xscale('log')
        axis.set_yscale('log')
        axis.set_xlabel('million parameters of the dense network')
        axis.set_ylabel(label)
        axis.grid(which='both', alpha=0.3)
        axis.legend(fontsize=8)
    save_figure(figure, path)
