"""Picture of scores over stored parameters."""

import os
from collections.abc import Sequence
from typing import Any

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter, StrMethodFormatter

from csg_seg.errors import CSGError
from csg_seg.mm.figures import save_figure

from .rows import Row, summarise

SPLITS = ('val', 'test')
MARKERS = 'os^Dv*PXp<>hd'
# These methods look alike in all pictures; others get the colours and markers that are left.
METHODS = (
    *('csg', 'narrow', 'separable', 'csg-trained', 'csg-binary', 'tucker', 'cp', 'pruned'),
    *('t-basis', 'hypernetwork', 'filter-basis', 'random-basis', 'mcnc'),
)
COLOURS = [colormaps[name](index) for name, count in (('tab10', 10), ('Dark2', 8)) for index in range(count)]


def draw_scores(rows: Sequence[Row], path: str | os.PathLike, *, network: str, size: str) -> None:
    """Save a picture of the scores of one network over the parameters that each method stores.

    The dense network is a line, with a band of one standard deviation where several seeds were trained.

    Args:
        rows: of a file of results.
        path: file of the picture (.png).
        network: whose cells are drawn.
        size: of the images.

    Raises:
        CSGError: the dense network is not among the rows.
    """
    cells = [each for each in summarise(rows) if each['network'] == network and each['size'] == size]
    if not any(each['method'] == 'dense' for each in cells):
        raise CSGError(f'{path}: the picture needs the scores of the dense network; add its cell to --only')
    splits = [split for split in SPLITS if any(each[split] for each in cells)]
    figure = Figure(figsize=(5 * len(splits), 4.2), layout='constrained')
    for axis, split in zip(figure.subplots(1, len(splits), squeeze=False)[0], splits, strict=True):
        _draw_split(axis, [each for each in cells if each[split]], split)
        axis.set_title(f'{network}, {size}, {split}')
    figure.axes[0].legend(fontsize='small')
    save_figure(figure, path)


def _draw_split(axis: Axes, cells: Sequence[dict[str, Any]], split: str) -> None:
    epochs = next(each['epochs'] for each in cells if each['method'] == 'dense')
    series: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for each in cells:
        if each['method'] == 'dense':
            mean, std = each[split]
            axis.axhline(mean, color='black', label='dense')
            axis.axhspan(mean - (std or 0), mean + (std or 0), color='black', alpha=0.1)
        else:
            longer = '' if each['epochs'] == epochs else f', {each["epochs"]} epochs'
            series.setdefault((each['method'], longer), []).append(each)
    methods = list(dict.fromkeys([*METHODS, *(method for method, _ in series)]))
    for (method, longer), several in series.items():
        place = methods.index(method)
        several = sorted(several, key=lambda each: each['stored_params'])
        means, stds = zip(*(each[split] for each in several), strict=True)
        axis.errorbar(
            [each['stored_params'] for each in several],
            means,
            yerr=[std or 0 for std in stds],
            color=COLOURS[place % len(COLOURS)],
            marker=MARKERS[place % len(MARKERS)],
            linestyle='--' if longer else '-',
            capsize=3,
            alpha=0.8,
            label=f'{method}{longer}',
        )
    axis.set_xscale('log')
    dense_params = cells[0]['dense_params']
    axis.set_xlim(min(each['stored_params'] for each in cells) / 1.5, 1.5 * dense_params)
    ratios = axis.secondary_xaxis('top', functions=(lambda x: dense_params / (x + 1e-9),) * 2)  # x may be 0
    ratios.set_xlabel('compression ratio')
    for scale, label in ((axis.xaxis, EngFormatter(sep='')), (ratios.xaxis, StrMethodFormatter('{x:g}x'))):
        scale.set_major_locator(LogLocator(subs=(1, 2, 5)))
        scale.set_major_formatter(label)
        scale.set_minor_formatter(NullFormatter())
    axis.set_xlabel('parameters stored')
    axis.set_ylabel(cells[0]['metric'])
    axis.grid(which='both', alpha=0.3)
