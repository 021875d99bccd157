"""The exception for mistakes that a user can correct, and the warning for likely ones."""

import difflib
from collections.abc import Sequence


class CSGError(ValueError):
    """A mistake that the user can correct; command-line tools print it as one line."""


class CSGWarning(UserWarning):
    """Something that the user most likely did not intend."""


def abridge(items: Sequence[str], *, most: int = 4) -> str:
    """Join the first few items of a list, and say how many more there are."""
    more = f' and {len(items) - most} more' if len(items) > most else ''
    return ', '.join(items[:most]) + more


def nearest(wanted: str, names: Sequence[str]) -> str:
    """Say which names are most like one that does not exist."""
    close = difflib.get_close_matches(wanted, names, n=3, cutoff=0.3)
    return f'the nearest are {", ".join(close)}' if close else f'names look like {names[-1]!r}'
