"""Which convs are generated, and why others are not."""

from collections import defaultdict
from collections.abc import Mapping, Sequence

from torch import nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils.parametrize import is_parametrized

from csg_seg.errors import CSGError
from csg_seg.generators.settings import Settings, matches
from csg_seg.generators.slices import grid
from csg_seg.layers.conv import find_convs, find_others


def choose_layers(model: nn.Module, settings: Sequence[Settings]) -> tuple[dict[str, int], dict[str, str]]:
    """Decide which convs are generated, by which generator, and why the others are not.

    Returns:
        ``taken``, layer name to generator position, and ``left_dense``, layer name to reason.

    Raises:
        CSGError: a dict takes no layer, a pattern names none, or a layer that is named in full cannot be generated.
    """
    convs, left_dense = find_convs(model), _others(model)
    obstacles = _obstacles(model, convs)
    first = next(iter(convs), None)
    for position, each in enumerate(settings):
        _check_patterns(position, each, [*left_dense, *convs])
        _check_named(position, each, obstacles | left_dense)
    taken: dict[str, int] = {}
    for name, conv in convs.items():
        if name in obstacles:
            left_dense[name] = obstacles[name]
            continue
        for position, each in enumerate(settings):
            reason = reason_to_skip(name, conv, each, is_first=name == first)
            if reason is None:
                taken[name] = position
                left_dense.pop(name, None)
                break
            if not (reason == OTHER_KERNEL and name in left_dense):
                left_dense[name] = reason
    for position, each in enumerate(settings):
        if position not in taken.values():
            raise CSGError(f'csg[{position}] takes no layer: {_why_nothing(each, convs, taken, left_dense)}')
    return taken, left_dense


def generable(model: nn.Module) -> dict[str, _ConvNd]:
    """Return the convs, by name, that a generator takes without being named in full."""
    refused = not_generable(model)
    return {name: conv for name, conv in find_convs(model).items() if name not in refused}


def not_generable(model: nn.Module) -> dict[str, str]:
    """Return the convs, by name, that no generator takes without being named in full, and why."""
    convs = find_convs(model)
    first = next(iter(convs), None)
    reasons = _others(model) | _obstacles(model, convs)
    for name, conv in convs.items():
        if name not in reasons:
            widest = Settings(slice_shape=tuple(conv.weight.shape), code_dim=1)
            reason = reason_to_skip(name, conv, widest, is_first=name == first)
            if reason is not None:
                reasons[name] = reason
    return reasons


OTHER_KERNEL = 'no generator of its kernel size'


def reason_to_skip(name: str, conv: _ConvNd, settings: Settings, *, is_first: bool) -> str | None:
    """Say why a generator does not take a conv; None when it takes it."""
    named = name in (settings.include or ())
    excluded = any(matches(name, pattern) for pattern in settings.exclude)
    if is_first and not named and not excluded:
        return "the network's first conv"
    if conv.kernel_size != settings.kernel:
        return OTHER_KERNEL
    if excluded:
        return 'excluded'
    if settings.include is not None and not any(matches(name, pattern) for pattern in settings.include):
        return 'not included'
    if not conv.weight.requires_grad:
        return 'frozen (requires_grad is False)'
    if not named and not conv.weight.is_meta and not conv.weight.any():
        # As those that give the offsets of a deformable conv.
        return 'its weight starts at zero'
    of_a_group, of_a_slice = conv.weight.shape[1], settings.slice_shape[1]
    if conv.groups > 1 and of_a_group < of_a_slice:
        # A depthwise conv would use one column of each slice.
        return f'grouped, {of_a_group} channels to a group and {of_a_slice} to a slice'
    rows, cols = grid(conv.weight.shape, settings.slice_shape)
    dense, out_channels = conv.weight.numel(), len(conv.weight)
    generated = rows * cols * settings.code_dim + settings.residual * (out_channels + dense // out_channels)
    if generated >= dense:
        return f'costs more generated: {generated:,} against {dense:,}'
    return None


def _others(model: nn.Module) -> dict[str, str]:
    """Return what has a conv's weight and cannot be generated because it is no conv of torch."""
    return {name: f'{type(module).__name__} is no conv of torch' for name, module in find_others(model).items()}


def _obstacles(model: nn.Module, convs: Mapping[str, _ConvNd]) -> dict[str, str]:
    """Return the convs that cannot be generated, and why."""
    holders = defaultdict(list)
    for name, module in model.named_modules():
        for key, parameter in module._parameters.items():
            holders[id(parameter)].append(f'{name}.{key}' if name else key)
    obstacles = {}
    for name, conv in convs.items():
        own = _obstacle(conv)
        # Something else in the model would keep the dense weight.
        own_name = f'{name}.weight' if name else 'weight'
        others = [other for other in holders[id(conv._parameters.get('weight'))] if other != own_name]
        if own or others:
            obstacles[name] = own or f'its weight is also {others[0]}'
    return obstacles


def _obstacle(conv: _ConvNd) -> str | None:
    kind = type(conv).__name__
    if 'forward' in vars(conv):
        return f'the forward of this {kind} has been replaced'
    weight = conv._parameters.get('weight')
    if is_parametrized(conv) or weight is None:
        return f'the weight of this {kind} is computed (weight norm, spectral norm, pruning or the like)'
    if weight.is_complex():
        return f'the weight of this {kind} is complex'
    return None


def _check_named(position: int, settings: Settings, obstacles: Mapping[str, str]) -> None:
    """Refuse a layer that the user asks for by name and cannot have."""
    for name in settings.include or ():
        if name in obstacles:
            raise CSGError(f'csg[{position}]: {name} cannot be generated: {obstacles[name]}; take it out of include')


def _check_patterns(position: int, settings: Settings, convs: Sequence[str]) -> None:
    for key in ('include', 'exclude'):
        for pattern in getattr(settings, key) or ():
            if convs and not any(matches(name, pattern) for name in convs):
                raise CSGError(
                    f'csg[{position}]: {key} pattern {pattern!r} names no conv of the model; '
                    f'names look like {convs[-1]!r}'
                )


def _why_nothing(
    settings: Settings,
    convs: Mapping[str, _ConvNd],
    taken: Mapping[str, int],
    left_dense: Mapping[str, str],
) -> str:
    """Explain that one dict takes no layer, and what to do."""
    fitting = [name for name, conv in convs.items() if conv.kernel_size == settings.kernel]
    if not fitting:
        kernel = 'x'.join(map(str, settings.kernel))
        kernels = sorted({conv.kernel_size for conv in convs.values()})
        if not kernels:
            return 'the model has no conv at all; retrofit a network that has'
        found = ', '.join('x'.join(map(str, kernel)) for kernel in kernels)
        return (
            f'slice_shape {settings.slice_shape} fits {kernel} kernels, the convs of the model have {found}; '
            'change the last numbers of slice_shape'
        )
    earlier = [name for name in fitting if name in taken]
    if earlier:
        return (
            f'earlier dicts took {earlier[0]} ({len(earlier)} layers that fit it); '
            'narrow their include, or drop this dict'
        )
    reasons = '; '.join(sorted({left_dense[name] for name in fitting}))
    return (
        f'of {len(fitting)} convs that fit its kernel, all stay dense ({reasons}); '
        'widen include (the first conv wants its full name), narrow exclude, unfreeze, or lower code_dim'
    )
