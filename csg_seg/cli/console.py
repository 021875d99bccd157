"""What tools print: tables and results on stdout, progress and notes on stderr."""

import json
import sys
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, redirect_stdout
from functools import partial
from importlib import import_module
from typing import Any

# rich is imported on use: if mm packages are missing too, the error names those, and their extra includes rich.


def stdout_console(*, width: int = 110) -> Any:
    """Return a rich console on stdout, as wide as the terminal, or ``width`` columns if stdout is no terminal."""
    return import_module('rich.console').Console(width=None if sys.stdout.isatty() else width)


def stderr_console() -> Any:
    """Return a rich console on stderr."""
    return import_module('rich.console').Console(stderr=True)


def progress_bar(description: str = 'Working...', *, transient: bool = False) -> Callable[..., Iterable]:
    """Return a function that iterates over a sequence and shows a progress bar on stderr.

    Args:
        description: text before the bar.
        transient: whether to remove the bar when done.
    """
    track = import_module('rich.progress').track
    return partial(track, description=description, console=stderr_console(), transient=transient)


def print_table(columns: Sequence[str], rows: Iterable[Sequence[str]], *, left: int = 1, width: int = 110) -> None:
    """Print a table. Long cells are folded, not cut.

    Args:
        columns: headers.
        rows: cells, printed as they are.
        left: number of left-aligned columns: the first ones hold text, the others numbers.
        width: width in characters if stdout is no terminal.
    """
    # As Text, because rich reads markup and emoji names in strings.
    table, text = import_module('rich.table').Table(), import_module('rich.text').Text
    for position, column in enumerate(columns):
        table.add_column(text(column), justify='left' if position < left else 'right', overflow='fold')
    for row in rows:
        table.add_row(*map(text, row))
    stdout_console(width=width).print(table)


def print_result(result: Any, print_text: Callable[[Any], object] = print, *, as_json: bool) -> None:
    """Print a result: as one line of JSON for programs, or for people by ``print_text``."""
    if as_json:
        print(json.dumps(result))
    else:
        print_text(result)


def notes_to_stderr(*, when: bool = True) -> AbstractContextManager:
    """Redirect what libraries print to stderr, because stdout is for the result."""
    return redirect_stdout(sys.stderr if when else sys.stdout)
