"""What a user says of one generator: a ``csg`` dict, checked."""

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from fnmatch import fnmatchcase
from typing import Any

from .errors import CSGError
from .slices import LAYOUTS

GENERATORS = ('linear', 'binary')
MAX_SEED = 2**64 - 1


@dataclass(frozen=True)
class Settings:
    """Settings of one generator and of the layers it feeds.

    Args:
        slice_shape: ``(s_out, s_in, kh, kw)`` of what the generator makes.
        code_dim: length of a code.
        layout: 'block', or 'flat' as in the authors' released files.
        generator: 'linear', or 'binary': frozen random signs, kept as a seed.
        freeze_generator: train the codes only. A binary generator is always frozen.
        include: patterns of the layers to generate; without it every conv that
            fits. The network's first conv only if it is named here in full.
        exclude: patterns of layers to leave dense.
        seed: of the start values; by default the generator's position.
    """

    slice_shape: tuple[int, int, int, int]
    code_dim: int
    layout: str = 'block'
    generator: str = 'linear'
    freeze_generator: bool = False
    include: tuple[str, ...] | None = None
    exclude: tuple[str, ...] = ()
    seed: int = 0

    @classmethod
    def from_dict(cls, csg: Mapping[str, Any], *, position: int = 0) -> 'Settings':
        """Check one ``csg`` dict.

        Args:
            csg: keys as the class's arguments; ``slice_shape`` and ``code_dim`` are required.
            position: the dict's place in the user's list, its name in errors.

        Raises:
            CSGError: a key is unknown or missing, or a value is out of range.
        """
        where = f'csg[{position}]'
        if not isinstance(csg, Mapping):
            raise CSGError(f'{where}: expected a dict of settings, got {type(csg).__name__} {csg!r}')
        known = [field.name for field in fields(cls)]
        for key in csg:
            if key not in known:
                close = difflib.get_close_matches(str(key), known, n=1)
                hint = f'did you mean {close[0]!r}?' if close else f'known keys: {", ".join(known)}'
                raise CSGError(f'{where}: unknown key {key!r}; {hint}')
        for key in ('slice_shape', 'code_dim'):
            if key not in csg:
                raise CSGError(
                    f'{where}: {key!r} is missing; for 3x3 convs try slice_shape=(16, 16, 3, 3), code_dim=128'
                )
        values = {'seed': position, **csg}
        return cls(
            slice_shape=_slice_shape(where, values['slice_shape']),
            code_dim=_integer(where, 'code_dim', values['code_dim'], minimum=1),
            layout=_choice(where, 'layout', values.get('layout', 'block'), LAYOUTS),
            generator=_choice(where, 'generator', values.get('generator', 'linear'), GENERATORS),
            freeze_generator=_flag(where, values),
            include=_patterns(where, 'include', values.get('include')),
            exclude=_patterns(where, 'exclude', values.get('exclude')) or (),
            seed=_integer(where, 'seed', values['seed'], minimum=0, maximum=MAX_SEED),
        )

    @property
    def kernel(self) -> tuple[int, int]:
        """``(kh, kw)`` of the convs this generator fits."""
        return self.slice_shape[2:]

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as JSON-ready values; the inverse of :meth:`from_dict`."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}


def matches(name: str, pattern: str) -> bool:
    """Say whether a shell-style pattern names a module or one of its ancestors."""
    return fnmatchcase(name, pattern) or fnmatchcase(name, f'{pattern}.*')


def _slice_shape(where: str, value: Any) -> tuple[int, int, int, int]:
    wanted = 'slice_shape must be four positive integers (s_out, s_in, kh, kw), such as (16, 16, 3, 3)'
    if not isinstance(value, Sequence) or isinstance(value, str) or len(value) != 4:
        raise CSGError(f'{where}: {wanted}; got {value!r}')
    if not all(isinstance(size, int) and not isinstance(size, bool) and size > 0 for size in value):
        raise CSGError(f'{where}: {wanted}; got {value!r}')
    s_out, s_in, kh, kw = value
    return s_out, s_in, kh, kw


def _integer(where: str, key: str, value: Any, *, minimum: int, maximum: int | None = None) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not minimum <= value <= (maximum or value):
        most = f' and at most {maximum}' if maximum else ''
        raise CSGError(f'{where}: {key} must be an integer of at least {minimum}{most}; got {value!r}')
    return value


def _choice(where: str, key: str, value: Any, choices: tuple[str, ...]) -> str:
    if value not in choices:
        raise CSGError(f'{where}: {key} must be one of {", ".join(map(repr, choices))}; got {value!r}')
    return value


def _flag(where: str, values: Mapping[str, Any]) -> bool:
    binary = values.get('generator') == 'binary'
    freeze = values.get('freeze_generator', binary)
    if not isinstance(freeze, bool):
        raise CSGError(f'{where}: freeze_generator must be True or False; got {freeze!r}')
    if binary and not freeze:
        raise CSGError(f"{where}: a binary generator cannot be trained; drop freeze_generator=False or use 'linear'")
    return freeze


def _patterns(where: str, key: str, value: Any) -> tuple[str, ...] | None:
    if value is None:
        return None
    patterns = [value] if isinstance(value, str) else value
    if not isinstance(patterns, Sequence) or not all(isinstance(pattern, str) for pattern in patterns):
        raise CSGError(f"{where}: {key} must be patterns on module names, such as ['backbone.*']; got {value!r}")
    return tuple(patterns)
