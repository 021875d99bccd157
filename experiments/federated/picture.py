"""Picture of federated averaging."""

import os
from collections.abc import Mapping
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from csg_seg.mm.figures import save_figure


def draw_federated(networks: Mapping[str, Mapping[str, Any]], path: str | os.PathLike, *, metric: str) -> None:
    """Save a picture of the score over rounds and over bytes.

    Args:
        networks: results of :func:`experiments.federated.averaging.federate`, by name.
        path: file of the picture (.png).
        metric: name of the score.
    """
    figure = Figure(figsize=(9, 4), layout='constrained')
    by_round, by_bytes = figure.subplots(1, 2, sharey=True)
    for (name, each), marker in zip(networks.items(), 'os^Dv*' * len(networks), strict=False):
        scores = [point['score'] for point in each['scores']]
        by_round.plot([point['round'] for point in each['scores']], scores, marker=marker, label=name)
        # The start, with zero bytes, is left out: the axis is logarithmic.
        megabytes = [point['bytes'] / 1e6 for point in each['scores']]
        by_bytes.plot(megabytes[1:], scores[1:], marker=marker, label=name)
    by_round.set_xlabel('rounds')
    by_round.xaxis.set_major_locator(MaxNLocator(integer=True))
    by_round.set_ylabel(metric)
    by_bytes.set_xlabel('MB sent and received by all workers')
    by_bytes.set_xscale('log')
    for axis in (by_round, by_bytes):
        axis.grid(which='both', alpha=0.3)
    by_round.legend(loc='lower right')
    save_figure(figure, path)
