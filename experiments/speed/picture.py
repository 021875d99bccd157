"""Picture of where time and memory go."""

import os
import statistics
from collections.abc import Mapping
from typing import Any

from matplotlib.figure import Figure

from csg_seg.mm.figures import save_figure

from .timing import HELD, PHASES, Load


def draw_speed(results: Mapping[str, Mapping[str, Any]], load: Load, path: str | os.PathLike, *, title: str) -> None:
    """Save a picture of where time and memory go.

    Args:
        results: result of :func:`experiments.speed.timing.measure_speed`.
        load: the load that was measured.
        path: file of the picture (.png).
        title: name of the network.
    """
    figure = Figure(figsize=(10, 4.2), layout='constrained')
    step, evaluation, memory = figure.subplots(1, 3)
    medians = {
        name: {key: statistics.median(values) * 1000 for key, values in each['seconds'].items()}
        for name, each in results.items()
    }
    _stack(step, {name: {key: each[key] for key in PHASES} for name, each in medians.items()}, 'ms of a training step')
    generation = medians['csg']['generation']
    share = generation / sum(medians['csg'][key] for key in PHASES)
    label = f'generation, {share:.1%} of it'
    step.bar('csg', generation, width=0.3, facecolor='white', edgecolor='black', hatch='///', label=label)
    step.legend(fontsize=8, loc='lower center', bbox_to_anchor=(0.5, 1), ncols=2)
    _stack(evaluation, {name: {'evaluation': each['evaluation']} for name, each in medians.items()}, 'ms to evaluate')
    held = {
        name: {key.removesuffix('_bytes'): each['bytes'][key] / 1e6 for key in HELD} for name, each in results.items()
    }
    _stack(memory, held, 'MB held in a step')
    size = f'{load.size[0]} x {load.size[1]}'
    figure.suptitle(
        f'{title}\n{load.batch_size} images of {size} a step, {load.eval_batch_size} to evaluate; {load.device}'
    )
    save_figure(figure, path)


def _stack(axis: Any, bars: Mapping[str, Mapping[str, float]], label: str) -> None:
    """Draw a stacked bar for each network."""
    names = list(bars)
    bottoms = [0.0] * len(names)
    for part in next(iter(bars.values())):
        heights = [bars[name][part] for name in names]
        axis.bar(names, heights, bottom=bottoms, label=part, width=0.6)
        bottoms = [bottom + height for bottom, height in zip(bottoms, heights, strict=True)]
    axis.set_ylabel(label)
    if len(next(iter(bars.values()))) > 1:
        axis.legend(fontsize=8, loc='lower center', bbox_to_anchor=(0.5, 1), ncols=2)
