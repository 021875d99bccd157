"""The rows of results/DATASET.json, one for each trained cell."""

import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from csg_seg.files import write_whole

Row = dict[str, Any]


def read_rows(file: Path) -> list[Row]:
    """Return the rows of a file; none if it does not exist."""
    return json.loads(file.read_text())['rows'] if file.exists() else []


def add_row(file: Path, row: Row, order: Sequence[str]) -> None:
    """Add a row to a file, in place of one of the same cell and seed.

    Args:
        file: written whole or not at all.
        row: of one cell.
        order: labels of cells, in the order of the table; other rows come last.
    """
    rows = {label_of(each): each for each in [*read_rows(file), row]}
    place = {label: position for position, label in enumerate(order)}
    ordered = sorted(rows.values(), key=lambda each: place.get(label_of(each), len(place)))
    text = ',\n'.join(json.dumps(each) for each in ordered)
    write_whole(file, lambda partial: partial.write_text(f'{{"rows": [\n{text}\n]}}\n'))


def label_of(row: Mapping[str, Any]) -> str:
    """Return the label of a row's cell."""
    return f'{row["cell"]}-s{row["seed"]}'


def summarise(rows: Iterable[Row]) -> list[dict[str, Any]]:
    """Return one entry for each cell, with mean and standard deviation over its seeds.

    Returns:
        in the order of the first row of each; ``val``, ``test`` and ``int8_test``, that of weights rounded to 8 bits,
        are ``(mean, std)``, std None for one seed; None where nothing was measured.
    """
    cells: dict[str, list[Row]] = {}
    for row in rows:
        cells.setdefault(row['cell'], []).append(row)
    kept = ('cell', 'network', 'method', 'size', 'metric', 'epochs', 'stored_params', 'dense_params')
    return [
        {
            **{key: several[0][key] for key in kept},
            'seeds': len(several),
            **{split: _mean([each[split] for each in several]) for split in ('val', 'test')},
            'int8_bytes': several[0].get('int8', {}).get('bytes'),
            'int8_test': _mean([each.get('int8', {}).get('test') for each in several]),
        }
        for several in cells.values()
    ]


def score_text(score: tuple[float, float | None] | None) -> str:
    """Return a mean and its standard deviation as text."""
    if score is None:
        return ''
    mean, std = score
    return f'{mean:.2f}' if std is None else f'{mean:.2f}±{std:.2f}'


def _mean(scores: Sequence[float | None]) -> tuple[float, float | None] | None:
    measured = [each for each in scores if each is not None]
    if not measured:
        return None
    return statistics.mean(measured), statistics.stdev(measured) if len(measured) > 1 else None
