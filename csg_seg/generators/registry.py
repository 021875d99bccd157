"""The kinds of generators by name, and how to add one."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

KINDS: dict[str, type[Any]] = {}
Kind = TypeVar('Kind', bound=type[Any])


@dataclass(frozen=True)
class Option:
    """An integer key of ``csg`` that one kind of generator adds.

    Args:
        minimum: the smallest value allowed.
        default: the value if the key is absent; None if the key is required.
    """

    minimum: int
    default: int | None = None


def register_generator(name: str) -> Callable[[Kind], Kind]:
    """Register a class of generators under a name, for ``csg=dict(generator=name)``.

    The page ``docs/your_own_generator.md`` has a complete example.

    Args:
        name: the value of ``generator``; an earlier class with this name is replaced.

    Returns:
        A decorator for subclasses of :class:`csg_seg.generators.linear.Generator`.
    """

    def register(kind: Kind) -> Kind:
        KINDS[name] = kind
        return kind

    return register
