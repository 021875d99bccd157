"""The settings of one generator: a ``csg`` dict, checked."""

import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from fnmatch import fnmatchcase
from numbers import Integral
from typing import Any

from csg_seg.errors import CSGError

from .kinds import KINDS
from .slices import LAYOUTS

MAX_SEED = 2**64 - 1
PRECISIONS = ('float32', 'autocast')
# What became of kinds of earlier versions.
REMOVED = {'tensor_ring': ', which was removed in 0.3.0 and is now in experiments/rivals'}


@dataclass(frozen=True)
class Settings:
    """Settings of one generator and of the layers that use it.

    In a ``csg`` dict, the options of the generator's kind are keys next to the others.

    Args:
        slice_shape: ``(s_out, s_in, kh, kw)`` of a slice; ``(s_out, s_in, k)`` for 1d convs,
            five numbers for 3d convs.
        code_dim: length of a code.
        layout: 'block', or 'flat' as in the authors' released files.
        generator: name of a registered kind.
        freeze_generator: train the codes only.
        include: name patterns of the layers to generate. Without it, all convs that
            fit are generated, except the network's first conv, which must be named in full.
        exclude: name patterns of layers to leave dense.
        seed: of the start values; by default the generator's position.
        options: the options of the generator's kind.
        residual: rank of the correction that each layer adds to its generated weight; 0 for none.
        precision: under autocast, 'autocast' generates weights in autocast's precision and 'float32' in the
            parameters'. Files do not depend on it.
    """

    slice_shape: tuple[int, ...]
    code_dim: int
    layout: str = 'block'
    generator: str = 'linear'
    freeze_generator: bool = False
    include: tuple[str, ...] | None = None
    exclude: tuple[str, ...] = ()
    seed: int = 0
    options: Mapping[str, int] = field(default_factory=dict, hash=False)
    residual: int = 0
    precision: str = 'autocast'

    @classmethod
    def from_dict(cls, csg: Mapping[str, Any], *, position: int = 0) -> 'Settings':
        """Check one ``csg`` dict.

        Args:
            csg: keys are the class's arguments and the options of the generator's kind;
                ``slice_shape`` and ``code_dim`` are required.
            position: the dict's index in the user's list, for errors and the default seed.

        Raises:
            CSGError: a key is unknown or missing, or a value is out of range.
        """
        where = f'csg[{position}]'
        if not isinstance(csg, Mapping):
            raise CSGError(f'{where}: expected a dict of settings, got {type(csg).__name__} {csg!r}')
        generator = _generator(where, csg.get('generator', 'linear'))
        check_keys(where, csg)
        _check_has_required(where, csg)
        values = {'seed': position, **csg}
        settings = cls(
            slice_shape=_slice_shape(where, values['slice_shape']),
            code_dim=_integer(where, 'code_dim', values['code_dim'], minimum=1),
            layout=_choice(where, 'layout', values.get('layout', 'block'), LAYOUTS),
            generator=generator,
            freeze_generator=_freeze(where, generator, values),
            include=read_patterns(where, 'include', values.get('include')),
            exclude=read_patterns(where, 'exclude', values.get('exclude')) or (),
            seed=_integer(where, 'seed', values['seed'], minimum=0, maximum=MAX_SEED),
            options=_options(where, generator, values),
            residual=_integer(where, 'residual', values.get('residual', 0), minimum=0),
            precision=_choice(where, 'precision', values.get('precision', Settings.precision), PRECISIONS),
        )
        try:
            KINDS[generator].check_settings(settings)
        except CSGError as error:
            raise CSGError(f'{where}: {error}') from None
        return settings

    @property
    def kernel(self) -> tuple[int, ...]:
        """``(kh, kw)`` of the convs that this generator fits; one number for 1d convs, three for 3d convs."""
        return self.slice_shape[2:]

    @property
    def optional(self) -> dict[str, int]:
        """The options and the residual; files hold them only where they are set."""
        return {**self.options, **({'residual': self.residual} if self.residual else {})}

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as JSON-ready values; the inverse of :meth:`from_dict`."""
        values = {key: getattr(self, key) for key in _own_keys() if key not in ('residual', 'precision')}
        values |= self.optional
        if self.precision != Settings.precision:
            values['precision'] = self.precision
        return {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}

    def to_csg(self, position: int) -> dict[str, Any]:
        """Return the ``csg`` dict for a position in the user's list, without the keys that have their defaults."""
        required = {'slice_shape': self.slice_shape, 'code_dim': self.code_dim}
        defaults = Settings.from_dict(required, position=position).to_dict()
        return required | {key: each for key, each in self.to_dict().items() if each != defaults.get(key)}


def matches(name: str, pattern: str) -> bool:
    """Say whether a shell-style pattern matches a module's name or an ancestor's."""
    # As it is written, too: a name may have brackets.
    is_written = name == pattern or name.startswith(f'{pattern}.')
    return is_written or fnmatchcase(name, pattern) or fnmatchcase(name, f'{pattern}.*')


def _own_keys() -> list[str]:
    return [each.name for each in fields(Settings) if each.name != 'options']


def _generator(where: str, value: Any) -> str:
    if not isinstance(value, str) or value not in KINDS:
        removed = REMOVED.get(value, '') if isinstance(value, str) else ''
        raise CSGError(
            f'{where}: unknown generator {value!r}{removed}; known are {", ".join(map(repr, KINDS))}; '
            'import the module that registers it (csg_seg.register_generator)'
        )
    return value


def check_keys(where: str, csg: Iterable[str]) -> None:
    """Refuse keys that no generator has.

    Raises:
        CSGError: names the key, and the one that was probably meant.
    """
    known = list(dict.fromkeys([*_own_keys(), *(key for kind in KINDS.values() for key in kind.OPTIONS)]))
    for key in csg:
        if key not in known:
            close = difflib.get_close_matches(str(key), [*known, 'ratio'], n=1, cutoff=0.5)
            hint = f'did you mean {close[0]!r}?' if close else f'known keys: {", ".join(known)}'
            raise CSGError(f'{where}: unknown key {key!r}; {hint}')


def _check_has_required(where: str, csg: Mapping[str, Any]) -> None:
    for key in ('slice_shape', 'code_dim'):
        if key not in csg:
            raise CSGError(f'{where}: {key!r} is missing; for 3x3 convs try slice_shape=(16, 16, 3, 3), code_dim=128')


def _slice_shape(where: str, value: Any) -> tuple[int, ...]:
    wanted = (
        'slice_shape must be four positive integers (s_out, s_in, kh, kw), such as (16, 16, 3, 3), '
        'or three or five for convs of one or three dimensions'
    )
    if not isinstance(value, Sequence) or isinstance(value, str) or len(value) not in (3, 4, 5):
        raise CSGError(f'{where}: {wanted}; got {value!r}')
    if not all(isinstance(size, Integral) and not isinstance(size, bool) and int(size) > 0 for size in value):
        raise CSGError(f'{where}: {wanted}; got {value!r}')
    return tuple(map(int, value))


def _integer(where: str, key: str, value: Any, *, minimum: int, maximum: int | None = None) -> int:
    if (
        isinstance(value, bool)
        or not isinstance(value, Integral)
        or not minimum <= int(value) <= (maximum or int(value))
    ):
        most = f' and at most {maximum}' if maximum else ''
        raise CSGError(f'{where}: {key} must be an integer of at least {minimum}{most}; got {value!r}')
    return int(value)


def _options(where: str, generator: str, values: Mapping[str, Any]) -> dict[str, int]:
    """Return the options of the generator's kind; refuse those of other kinds."""
    own = KINDS[generator].OPTIONS
    for name, kind in KINDS.items():
        for key in kind.OPTIONS:
            if key not in own and values.get(key) is not None:
                raise CSGError(f'{where}: {key!r} is a key of generator={name!r}, not of {generator!r}; drop it')
    found = {}
    for key, option in own.items():
        value = option.default if values.get(key) is None else values[key]
        if value is None:
            raise CSGError(f'{where}: {key!r} is missing; generator={generator!r} needs it, try {key}=8')
        found[key] = _integer(where, key, value, minimum=option.minimum)
    return found


def _choice(where: str, key: str, value: Any, choices: Sequence[str]) -> str:
    if value not in choices:
        raise CSGError(f'{where}: {key} must be one of {", ".join(map(repr, choices))}; got {value!r}')
    return value


def _freeze(where: str, generator: str, values: Mapping[str, Any]) -> bool:
    always = KINDS[generator].always_frozen
    freeze = values.get('freeze_generator', always)
    if not isinstance(freeze, bool):
        raise CSGError(f'{where}: freeze_generator must be True or False; got {freeze!r}')
    if always and not freeze:
        raise CSGError(
            f"{where}: a {generator} generator cannot be trained; drop freeze_generator=False or use 'linear'"
        )
    return freeze


def read_patterns(where: str, key: str, value: Any) -> tuple[str, ...] | None:
    """Check the name patterns in ``where``'s setting ``key``: one, several, or None."""
    if value is None:
        return None
    patterns = [value] if isinstance(value, str) else value
    if not isinstance(patterns, Sequence) or not all(isinstance(pattern, str) for pattern in patterns):
        raise CSGError(f"{where}: {key} must be patterns on module names, such as ['backbone.*']; got {value!r}")
    return tuple(patterns)
