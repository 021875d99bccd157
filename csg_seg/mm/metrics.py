"""Accuracy of each class as a table in the log, and the confusion matrix as a picture."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from mmengine.logging import MMLogger, print_log
from mmengine.registry import METRICS
from mmpretrain.evaluation import ConfusionMatrix
from rich.console import Console
from rich.table import Table

from .figures import save_figure


@METRICS.register_module()
class PerClassAccuracy(ConfusionMatrix):
    """Accuracy of each class, in percent, and a picture of the confusion matrix.

    Args:
        out: the picture to write; by default ``confusion_matrix.png`` in the folder of the log.
        most: report at most this number of classes, those with the lowest accuracy.
        kwargs: arguments of :class:`mmpretrain.evaluation.ConfusionMatrix`.
    """

    default_prefix = 'accuracy_of'

    def __init__(self, *, out: str | None = None, most: int = 20, **kwargs: Any):
        super().__init__(**kwargs)
        self.out = out
        self.most = most

    def compute_metrics(self, results: list) -> dict[str, float]:
        """Return the accuracy of the worst classes that have samples; mmengine calls this in the main process only."""
        matrix = super().compute_metrics(results)['result'].cpu()
        names = _distinct((self.dataset_meta or {}).get('classes') or [str(i) for i in range(len(matrix))])
        samples = matrix.sum(1)
        seen = [i for i in range(len(names)) if samples[i] > 0]
        worst = sorted(seen, key=lambda i: float(matrix[i, i] / samples[i]))[: self.most]
        shown = {names[i]: 100 * int(matrix[i, i]) / int(samples[i]) for i in sorted(worst)}
        picture = Path(self.out) if self.out else _log_folder() / 'confusion_matrix.png'
        save_figure(draw_confusion(matrix, names), picture, dpi=110)
        table = _table(shown, {names[i]: int(samples[i]) for i in worst}, left_out=len(seen) - len(worst))
        print_log(f'\n{table}confusion matrix: {picture}', logger='current')
        return shown


def _distinct(names: Sequence[str]) -> list[str]:
    """Number the classes that share a name; ImageNet's 'crane' is a bird and a machine."""
    return [f'{name} ({i})' if names.count(name) > 1 else name for i, name in enumerate(names)]


def _table(accuracy: dict[str, float], samples: dict[str, int], *, left_out: int) -> str:
    table = Table(
        'class', 'samples', 'accuracy', caption=f'{left_out} better classes are not shown' if left_out else None
    )
    for name, value in accuracy.items():
        table.add_row(name, str(samples[name]), f'{value:.2f}')
    console = Console(width=80)
    with console.capture() as text:
        console.print(table)
    return text.get()


def draw_confusion(matrix: torch.Tensor, names: list[str]) -> Figure:
    """Draw a confusion matrix with a row for each true class, in percent of the row's samples.

    Args:
        matrix: counts ``(classes, classes)``.
        names: names of the classes; shown for up to 30 classes.
    """
    share = 100 * matrix / matrix.sum(1, keepdim=True).clamp(min=1)
    few = len(names) <= 30
    side = 1.8 + 0.5 * len(names) if few else 9.0
    figure = Figure(figsize=(side + 1, side))
    axis = figure.subplots()
    image = axis.imshow(share, cmap='Blues', vmin=0, vmax=100)
    figure.colorbar(image, ax=axis, label='% of the true class', shrink=0.8)
    axis.set(
        xlabel='predicted class', ylabel='true class', title=f'{100 * matrix.trace() / matrix.sum():.2f} % correct'
    )
    if few:
        ticks = range(len(names))
        axis.set_xticks(ticks, names, rotation=45, ha='right')
        axis.set_yticks(ticks, names)
        for row in ticks:
            for column in ticks:
                value = float(share[row, column])
                if value >= 0.5:
                    colour = 'white' if value > 50 else 'black'
                    axis.text(column, row, f'{value:.0f}', ha='center', va='center', color=colour, fontsize=8)
    figure.tight_layout()
    return figure


def _log_folder() -> Path:
    handlers = MMLogger.get_current_instance().handlers
    files = [handler.baseFilename for handler in handlers if isinstance(handler, logging.FileHandler)]
    return Path(files[0]).parent if files else Path()
