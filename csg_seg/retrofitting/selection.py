"""Which convs are generated, and why the others stay dense."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum

from torch import nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils.parametrize import is_parametrized

from csg_seg.errors import CSGError, abridge, nearest
from csg_seg.generators.settings import Settings, matches
from csg_seg.generators.slices import grid
from csg_seg.layers.conv import RESERVED, find_convs, find_others, shape_of_weight


class Cause(Enum):
    """Why a conv stays dense; the value is the text for users."""

    FIRST = "the network's first conv"
    OTHER_KERNEL = 'no generator of its kernel size'
    EXCLUDED = 'excluded'
    NOT_INCLUDED = 'not included'
    FROZEN = 'frozen (requires_grad is False)'
    ZERO = 'its weight starts at zero'
    GROUPED = 'grouped'
    COSTS_MORE = 'costs more generated'
    NOT_TORCH = 'not a conv of torch'
    REPLACED_FORWARD = 'its forward has been replaced'
    COMPUTED = 'its parameters are computed (weight norm, spectral norm, pruning or similar)'
    COMPLEX = 'its weight is complex'
    SHARED = 'its weight is also used elsewhere'
    HOOKED = 'its weight has a hook on its gradient'
    OTHER_SHAPE = 'its weight does not have the shape that its channels and kernel give'
    NAME_TAKEN = 'it has an attribute that generated convs need'
    DENSE_IN_FILE = 'dense in the compact checkpoint'


@dataclass(frozen=True)
class Reason:
    """Why one conv stays dense: the cause, and details such as the numbers compared."""

    cause: Cause
    detail: str = ''

    def __str__(self) -> str:
        return f'{self.cause.value}: {self.detail}' if self.detail else self.cause.value


def choose_layers(model: nn.Module, settings: Sequence[Settings]) -> tuple[dict[str, int], dict[str, Reason]]:
    """Decide which convs are generated, by which generator, and why the others are not.

    Returns:
        ``taken``, the generator's position by layer name, and ``left_dense``, the reason by layer name.

    Raises:
        CSGError: a dict takes no layer, a pattern matches none, or a layer included by its full name cannot be
            generated.
    """
    convs = find_convs(model)
    left_dense = _not_torch(model) | find_obstacles(model, convs)
    for position, each in enumerate(settings):
        _check_patterns(position, each, [*left_dense, *convs], left_dense)
    taken: dict[str, int] = {}
    for name, conv in convs.items():
        if name in left_dense:
            continue
        reasons = []
        for position, each in enumerate(settings):
            reason = reason_to_skip(name, conv, each, is_first=name == next(iter(convs)))
            if reason is None:
                taken[name] = position
                break
            reasons.append(reason)
        else:
            # A dict for another kernel size says nothing about this conv.
            telling = [reason for reason in reasons if reason.cause is not Cause.OTHER_KERNEL]
            left_dense[name] = (telling or reasons)[-1]
    for position, each in enumerate(settings):
        if position not in taken.values():
            raise CSGError(f'csg[{position}] takes no layer: {_why_nothing(each, convs, taken, left_dense)}')
    return taken, left_dense


def generable(
    model: nn.Module, include: tuple[str, ...] | None = None, exclude: tuple[str, ...] = ()
) -> dict[str, _ConvNd]:
    """Return, by name, the convs that some generator with these patterns would take."""
    refused = not_generable(model, include, exclude)
    return {name: conv for name, conv in find_convs(model).items() if name not in refused}


def not_generable(
    model: nn.Module, include: tuple[str, ...] | None = None, exclude: tuple[str, ...] = ()
) -> dict[str, Reason]:
    """Return, by name, why the other convs are taken by no generator with these patterns."""
    convs = find_convs(model)
    reasons = _not_torch(model) | find_obstacles(model, convs)
    for name, conv in convs.items():
        if name not in reasons:
            shape = tuple(conv.weight.shape)
            widest = Settings(slice_shape=shape, code_dim=1, include=include, exclude=exclude)
            reason = reason_to_skip(name, conv, widest, is_first=name == next(iter(convs)))
            if reason is not None:
                reasons[name] = reason
    return reasons


def reason_to_skip(name: str, conv: _ConvNd, settings: Settings, *, is_first: bool) -> Reason | None:
    """Return why a generator with these settings does not take a conv, or None if it does."""
    named = name in (settings.include or ())
    excluded = any(matches(name, pattern) for pattern in settings.exclude)
    if is_first and not named and not excluded:
        return Reason(Cause.FIRST)
    if conv.kernel_size != settings.kernel:
        return Reason(Cause.OTHER_KERNEL)
    if excluded:
        return Reason(Cause.EXCLUDED)
    if settings.include is not None and not any(matches(name, pattern) for pattern in settings.include):
        return Reason(Cause.NOT_INCLUDED)
    if not conv.weight.requires_grad:
        return Reason(Cause.FROZEN)
    if not named and not conv.weight.is_meta and not conv.weight.any():
        # Such as the conv that predicts the offsets of a deformable conv.
        return Reason(Cause.ZERO)
    of_a_group, of_a_slice = conv.weight.shape[1], settings.slice_shape[1]
    if conv.groups > 1 and of_a_group < of_a_slice:
        # A depthwise conv would use one column of each slice.
        return Reason(Cause.GROUPED, f'{of_a_group} channels to a group and {of_a_slice} to a slice')
    rows, cols = grid(conv.weight.shape, settings.slice_shape)
    dense, out_channels = conv.weight.numel(), len(conv.weight)
    generated = rows * cols * settings.code_dim + settings.residual * (out_channels + dense // out_channels)
    return Reason(Cause.COSTS_MORE, f'{generated:,} against {dense:,}') if generated >= dense else None


def find_obstacles(model: nn.Module, convs: Mapping[str, _ConvNd]) -> dict[str, Reason]:
    """Return, by name, why some of a model's convs cannot be generated with any settings."""
    holders = _holders(model)
    obstacles = {}
    for name, conv in convs.items():
        weight = conv._parameters.get('weight')
        # Another holder of the weight would keep the dense one.
        others = [holder for holder in holders[id(weight)] if holder != f'{name}.weight'.removeprefix('.')]
        if 'forward' in vars(conv):
            obstacles[name] = Reason(Cause.REPLACED_FORWARD)
        elif is_parametrized(conv) or weight is None:
            obstacles[name] = Reason(Cause.COMPUTED)
        elif weight.is_complex():
            obstacles[name] = Reason(Cause.COMPLEX)
        elif others:
            obstacles[name] = Reason(Cause.SHARED, others[0])
        elif weight._backward_hooks or weight._post_accumulate_grad_hooks:
            obstacles[name] = Reason(Cause.HOOKED)
        elif not isinstance(conv.kernel_size, tuple):
            obstacles[name] = Reason(Cause.OTHER_SHAPE, f'kernel_size is {conv.kernel_size}, not a tuple')
        elif weight.shape != shape_of_weight(conv):
            obstacles[name] = Reason(Cause.OTHER_SHAPE, f'{tuple(weight.shape)}, not {tuple(shape_of_weight(conv))}')
        elif taken := RESERVED & {*dir(conv)}:
            obstacles[name] = Reason(Cause.NAME_TAKEN, min(taken))
    return obstacles


def _holders(model: nn.Module) -> dict[int, list[str]]:
    """Return, by the id of each parameter, the names of the attributes that hold it, lists and dicts included."""
    holders = defaultdict(list)
    for name, module in model.named_modules():
        held = [*module._parameters.items()]
        for key, value in vars(module).items():
            if not key.startswith('_') and isinstance(value, (list, tuple, dict)):
                held += [(key, each) for each in (value.values() if isinstance(value, dict) else value)]
        for key, each in held:
            if isinstance(each, nn.Parameter):
                holders[id(each)].append(f'{name}.{key}'.removeprefix('.'))
    return holders


def _not_torch(model: nn.Module) -> dict[str, Reason]:
    return {name: Reason(Cause.NOT_TORCH, type(module).__name__) for name, module in find_others(model).items()}


def _check_patterns(position: int, settings: Settings, names: Sequence[str], obstacles: Mapping[str, Reason]) -> None:
    """Refuse patterns that match no conv, and full names of convs that cannot be generated."""
    for key in ('include', 'exclude'):
        check_patterns(f'csg[{position}]', key, getattr(settings, key) or (), names)
    for pattern in settings.include or ():
        if pattern in obstacles:
            raise CSGError(
                f'csg[{position}]: {pattern} cannot be generated: {obstacles[pattern]}; remove it from include'
            )


def check_patterns(where: str, key: str, patterns: Sequence[str], names: Sequence[str]) -> None:
    """Refuse patterns that match none of a model's convs, if it has any.

    Raises:
        CSGError: names the pattern.
    """
    for pattern in patterns:
        if names and not any(matches(name, pattern) for name in names):
            parts = [name.split('.') for name in names]
            wider = dict.fromkeys('.'.join(each[:end]) for each in parts for end in range(1, len(each) + 1))
            raise CSGError(
                f'{where}: {key} pattern {pattern!r} names no conv of the model; {nearest(pattern, [*wider])}'
            )


def _why_nothing(
    settings: Settings, convs: Mapping[str, _ConvNd], taken: Mapping[str, int], left_dense: Mapping[str, Reason]
) -> str:
    """Explain that one dict takes no layer, and what to do."""
    if not convs:
        return 'the model has no conv at all; retrofit a network that has'
    fitting = [name for name, conv in convs.items() if conv.kernel_size == settings.kernel]
    if not fitting:
        kernels = [settings.kernel, *sorted({conv.kernel_size for conv in convs.values()})]
        wanted, *found = ('x'.join(map(str, kernel)) for kernel in kernels)
        return (
            f'slice_shape {settings.slice_shape} fits {wanted} kernels, the convs of the model have '
            f'{", ".join(found)}; change the last numbers of slice_shape'
        )
    earlier = [name for name in fitting if name in taken]
    if earlier:
        return (
            f'earlier dicts took {earlier[0]} ({len(earlier)} layers that fit it); '
            'narrow their include, or drop this dict'
        )
    reasons = abridge(list(dict.fromkeys(str(left_dense[name]) for name in fitting)))
    return (
        f'of {len(fitting)} convs that fit its kernel, all stay dense ({reasons}); widen include (the first conv '
        'needs its full name), narrow exclude, unfreeze, or lower code_dim'
    )
