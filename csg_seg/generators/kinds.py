"""The table of the kinds of generators, which registry.py fills, and the options of a kind."""

from dataclasses import dataclass
from typing import Any

KINDS: dict[str, type[Any]] = {}


@dataclass(frozen=True)
class Option:
    """An integer key of ``csg`` that one kind of generator adds.

    Args:
        minimum: the smallest value allowed.
        default: the value if the key is absent; None if the key is required.
    """

    minimum: int
    default: int | None = None
