"""What a user says of one generator: a ``csg`` dict, checked."""

import difflib
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from fnmatch import fnmatchcase
from typing import Any

from csg_seg.errors import CSGError

from .slices import LAYOUTS

GENERATORS = ('linear', 'binary', 'mlp', 'tensor_ring')
MAX_SEED = 2**64 - 1

# Written only where set: files of the paper's generators are what they were without these keys.
OPTIONAL = ('hidden', 'rank', 'mode', 'residual')


@dataclass(frozen=True)
class Settings:
    """Settings of one generator and of the layers it feeds.

    Args:
        slice_shape: ``(s_out, s_in, kh, kw)`` of what the generator makes;
            ``(s_out, s_in, k)`` for convs of one dimension, five numbers for three.
        code_dim: length of a code.
        layout: 'block', or 'flat' as in the authors' released files.
        generator: 'linear', 'binary' (frozen random signs, kept as a seed), 'mlp' or 'tensor_ring'.
        freeze_generator: train the codes only. A binary generator is always frozen.
        include: patterns of the layers to generate; without it every conv that
            fits. The network's first conv only if it is named here in full.
        exclude: patterns of layers to leave dense.
        seed: of the start values; by default the generator's position.
        hidden: units of an mlp's hidden layer.
        rank: of a tensor ring.
        mode: size of each index of a tensor ring, 4 unless given.
        residual: rank of the correction that each layer adds to its generated weight; 0 for none.
    """

    slice_shape: tuple[int, ...]
    code_dim: int
    layout: str = 'block'
    generator: str = 'linear'
    freeze_generator: bool = False
    include: tuple[str, ...] | None = None
    exclude: tuple[str, ...] = ()
    seed: int = 0
    hidden: int | None = None
    rank: int | None = None
    mode: int | None = None
    residual: int = 0

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
        settings = cls(
            slice_shape=_slice_shape(where, values['slice_shape']),
            code_dim=_integer(where, 'code_dim', values['code_dim'], minimum=1),
            layout=_choice(where, 'layout', values.get('layout', 'block'), LAYOUTS),
            generator=_choice(where, 'generator', values.get('generator', 'linear'), GENERATORS),
            freeze_generator=_flag(where, values),
            include=read_patterns(where, 'include', values.get('include')),
            exclude=read_patterns(where, 'exclude', values.get('exclude')) or (),
            seed=_integer(where, 'seed', values['seed'], minimum=0, maximum=MAX_SEED),
            hidden=_own_integer(where, 'hidden', values, kind='mlp', minimum=1),
            rank=_own_integer(where, 'rank', values, kind='tensor_ring', minimum=1),
            mode=_own_integer(where, 'mode', values, kind='tensor_ring', minimum=2, default=4),
            residual=_integer(where, 'residual', values.get('residual', 0), minimum=0),
        )
        if settings.generator == 'tensor_ring':
            _check_ring(where, settings)
        return settings

    @property
    def kernel(self) -> tuple[int, ...]:
        """``(kh, kw)`` of the convs this generator fits, or as many numbers as they have dimensions."""
        return self.slice_shape[2:]

    @property
    def cores(self) -> int:
        """Number of cores of a tensor ring: the least whose indices reach every value of a slice."""
        assert self.mode is not None
        cores = 1
        while self.mode**cores < math.prod(self.slice_shape):
            cores += 1
        return cores

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as JSON-ready values; the inverse of :meth:`from_dict`."""
        values = {key: value for key, value in asdict(self).items() if value or key not in OPTIONAL}
        return {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}


def matches(name: str, pattern: str) -> bool:
    """Say whether a shell-style pattern names a module or one of its ancestors."""
    return fnmatchcase(name, pattern) or fnmatchcase(name, f'{pattern}.*')


def _slice_shape(where: str, value: Any) -> tuple[int, ...]:
    wanted = (
        'slice_shape must be four positive integers (s_out, s_in, kh, kw), such as (16, 16, 3, 3), '
        'or three or five for convs of one or three dimensions'
    )
    if not isinstance(value, Sequence) or isinstance(value, str) or len(value) not in (3, 4, 5):
        raise CSGError(f'{where}: {wanted}; got {value!r}')
    if not all(isinstance(size, int) and not isinstance(size, bool) and size > 0 for size in value):
        raise CSGError(f'{where}: {wanted}; got {value!r}')
    return tuple(value)


def _integer(where: str, key: str, value: Any, *, minimum: int, maximum: int | None = None) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not minimum <= value <= (maximum or value):
        most = f' and at most {maximum}' if maximum else ''
        raise CSGError(f'{where}: {key} must be an integer of at least {minimum}{most}; got {value!r}')
    return value


def _own_integer(
    where: str, key: str, values: Mapping[str, Any], *, kind: str, minimum: int, default: int | None = None
) -> int | None:
    """Check a key that one kind of generator has and the others lack."""
    generator, value = values.get('generator', 'linear'), values.get(key)
    if generator != kind:
        if value is not None:
            raise CSGError(f'{where}: {key!r} is a key of generator={kind!r}, not of {generator!r}; drop it')
        return None
    if value is None and default is None:
        raise CSGError(f'{where}: {key!r} is missing; generator={kind!r} needs it, try {key}=8')
    return _integer(where, key, default if value is None else value, minimum=minimum)


def _check_ring(where: str, settings: Settings) -> None:
    code_dim, mode, size = settings.code_dim, settings.mode, math.prod(settings.slice_shape)
    assert mode is not None
    if mode >= size:
        raise CSGError(f'{where}: mode must be less than the {size} values of a slice; got {mode}')
    cores = settings.cores
    if code_dim % cores:
        below = max(code_dim // cores, 1) * cores
        raise CSGError(
            f'{where}: a tensor ring of mode {mode} makes {size} values with {cores} cores, so code_dim must be '
            f'a multiple of {cores}, such as {below} or {below + cores}; got {code_dim}'
        )


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


def read_patterns(where: str, key: str, value: Any) -> tuple[str, ...] | None:
    """Check patterns on module names: one, several, or None."""
    if value is None:
        return None
    patterns = [value] if isinstance(value, str) else value
    if not isinstance(patterns, Sequence) or not all(isinstance(pattern, str) for pattern in patterns):
        raise CSGError(f"{where}: {key} must be patterns on module names, such as ['backbone.*']; got {value!r}")
    return tuple(patterns)
