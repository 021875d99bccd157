"""Rows of checked networks: read from a file, and summarised."""

import json
import statistics
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from csg_seg.errors import CSGError

# From best to worst.
RESULTS = ('pass', 'no conv', 'refused', 'not run dense', 'not done', 'fail')
COLUMNS = {'scope', 'name', 'result', 'reason', 'seconds'}
COLUMNS_OF_A_PASS = COLUMNS | {'trains_on', 'generated', 'ratio', 'left_dense'}


def read_rows(path: Path, scope: str) -> list[dict[str, Any]]:
    """Return the rows that a run has written so far; none if the file does not exist.

    Raises:
        CSGError: a line is not a row, or a row of another library.
    """
    rows = []
    try:
        lines = path.read_text().splitlines() if path.exists() else []
    except UnicodeDecodeError:
        raise CSGError(f'{path} is not a text file; choose another') from None
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        wanted = COLUMNS_OF_A_PASS if isinstance(row, dict) and row.get('result') == 'pass' else COLUMNS
        if not isinstance(row, dict) or not wanted <= row.keys():
            raise CSGError(
                f'{path}: line {number} is not a row of such a check; delete the line, or choose another file'
            )
        if row['scope'] != scope:
            raise CSGError(f'{path}: line {number} is of {row["scope"]}; choose another file for {scope}')
        rows.append(row)
    return rows


def summarise_rows(rows: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Summarise rows.

    Returns:
        ``results``, the number of rows with each of :data:`RESULTS`; for the networks that passed: ``on_losses``,
        the number trained on losses, ``generated``, the number of generated convs, ``left_dense``, the number of
        dense convs for each reason, and ``ratio``, the smallest, median and largest ratio, if any passed.
    """
    rows = list(rows)
    passed = [row for row in rows if row['result'] == 'pass']
    left: Counter[str] = Counter()
    for row in passed:
        left.update(row['left_dense'])
    ratios = [row['ratio'] for row in passed]
    return {
        'results': {result: sum(row['result'] == result for row in rows) for result in RESULTS},
        'on_losses': sum(row['trains_on'] == 'losses' for row in passed),
        'generated': sum(row['generated'] for row in passed),
        'left_dense': left,
        'ratio': (min(ratios), statistics.median(ratios), max(ratios)) if ratios else (),
    }
