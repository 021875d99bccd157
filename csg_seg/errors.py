"""The exception that names a user's mistake, and the warning that tells of a likely one."""

from collections.abc import Sequence


class CSGError(ValueError):
    """A mistake the user can mend; command-line tools print it as one line."""


class CSGWarning(UserWarning):
    """What a user most likely did not mean, and is told once."""


def abridge(items: Sequence[str], *, most: int = 4) -> str:
    """Join the first few items of a list, and say how many more there are."""
    more = f' and {len(items) - most} more' if len(items) > most else ''
    return ', '.join(items[:most]) + more
