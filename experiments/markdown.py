"""Results and Markdown tables."""

import json
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULT_FILES = ROOT / 'results'


def read(name: str) -> dict[str, Any]:
    """Return ``results/NAME.json``."""
    return json.loads((RESULT_FILES / f'{name}.json').read_text())


def markdown(columns: Sequence[str], rows: Iterable[Sequence[object]], *, left: Sequence[int] = (0,)) -> str:
    """Return a Markdown table; columns are right-aligned unless their position is in ``left``."""
    rule = ['---' if position in left else '---:' for position in range(len(columns))]
    lines = [' | '.join(map(str, row)) for row in (columns, *rows)]
    return '\n'.join([f'| {lines[0]} |', f'|{"|".join(rule)}|', *(f'| {line} |' for line in lines[1:])])


def median(values: Iterable[float]) -> str:
    """Return the median with two decimals."""
    return f'{statistics.median(values):.2f}'


def percent(share: float, digits: int) -> str:
    """Return a share in percent."""
    return f'{100 * share:.{digits}f} %'


def megabytes(count: int) -> str:
    """Return MB with two significant digits or more."""
    return f'{count / 1e6:.1f}' if count < 1e7 else f'{count / 1e6:.0f}'


def link(name: str) -> str:
    """Return a link from experiments/README.md to ``results/NAME.json``."""
    return f'[{name}](../results/{name}.json)'
