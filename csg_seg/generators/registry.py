"""The kinds of generators by name, and how to add one."""

from collections.abc import Callable
from typing import TypeVar

import torch

from csg_seg.errors import CSGError

from .kinds import KINDS, Option
from .linear import Generator
from .settings import Settings
from .signature import RESERVED

__all__ = ['KINDS', 'Option', 'build_generator', 'register_generator']

Kind = TypeVar('Kind', bound=type[Generator])


def register_generator(name: str) -> Callable[[Kind], Kind]:
    """Register a class of generators under a name, for ``csg=dict(generator=name)``.

    The page ``docs/your_own_generator.md`` has a complete example.

    Args:
        name: the value of ``generator``.

    Returns:
        A decorator for subclasses of :class:`csg_seg.generators.linear.Generator`.

    Raises:
        CSGError: the name is not text. The decorator raises it if the class is not a generator, if another class has
            the name, or if an option has the name of a setting.
    """
    if not isinstance(name, str):
        raise CSGError(f"register_generator needs a name, such as @register_generator('mine'); got {name!r}")

    def register(kind: Kind) -> Kind:
        if not (isinstance(kind, type) and issubclass(kind, Generator)):
            raise CSGError(f'generator {name!r}: {kind!r} is not a subclass of csg_seg.generators.linear.Generator')
        known = KINDS.get(name, kind)
        # The same class again, as after a reload, takes the place of the old one.
        if (known.__module__, known.__qualname__) != (kind.__module__, kind.__qualname__):
            raise CSGError(f'generator {name!r}: {known.__qualname__} has this name already; choose another')
        for option in kind.OPTIONS:
            if option in RESERVED:
                raise CSGError(f'generator {name!r}: csg_seg itself uses the name {option!r}; rename the option')
        KINDS[name] = kind
        return kind

    return register


register_generator('linear')(Generator)


def build_generator(settings: Settings, rng: torch.Generator) -> Generator:
    """Build the generator that the settings describe, with start values drawn by ``rng``."""
    return KINDS[settings.generator](settings, rng)
