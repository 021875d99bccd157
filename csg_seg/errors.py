"""The one exception that names a user's mistake."""

from collections.abc import Sequence


class CSGError(ValueError):
    """A mistake the user can mend; command-line tools print it as one line."""


def abridge(items: Sequence[str], *, most: int = 4) -> str:
    """Join the first few items of a list, and say how many more there are."""
    more = f' and {len(items) - most} more' if len(items) > most else ''
    return ', '.join(items[:most]) + more
