"""Choose layers; dense to generated, and back to plain convs."""

import warnings
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.nn.modules.conv import _ConvNd
from torch.nn.parameter import UninitializedParameter
from torch.nn.utils.parametrize import is_parametrized

from .bank import BANK, GeneratorBank, attach_bank, detach_bank, find_bank, find_roots
from .conv import (
    CSGConv,
    add_residual,
    find_convs,
    find_others,
    generate_weights,
    generated_convs,
    named_convs,
    swap_in,
    swap_out,
)
from .errors import CSGError, CSGWarning, abridge
from .generator import build_generator
from .report import summarise
from .root import check_rootable
from .settings import Settings, matches, read_patterns
from .slices import grid
from .watch import WATCH

CSG = Mapping[str, Any] | Sequence[Mapping[str, Any]]


def retrofit(model: nn.Module, csg: CSG) -> nn.Module:
    """Make the weights of a model's convs from shared generators, in place.

    Do it before the model is wrapped for data parallelism (use
    ``DistributedDataParallel``, not ``DataParallel``) and before the optimizer is
    built. Trained weights of the chosen layers are not kept: they start anew, at
    Kaiming variance, drawn from the dicts' own seeds.

    Args:
        model: any network of convs: of one to three dimensions, grouped, transposed,
            and subclasses that compute with their own ``weight``.
        csg: a dict of settings (see :class:`csg_seg.settings.Settings`), or a
            list of dicts for several generators; a layer goes to the first that takes it.

    Returns:
        The same model.

    Raises:
        CSGError: a setting is wrong, a dict takes no layer, or a layer cannot be generated.
    """
    dicts = [csg] if isinstance(csg, Mapping) else csg
    if not isinstance(dicts, Sequence) or len(dicts) == 0:
        raise CSGError(f'csg must be a dict with slice_shape and code_dim, or a list of such dicts; got {csg!r}')
    settings = [Settings.from_dict(each, position=position) for position, each in enumerate(dicts)]
    check_root(model)
    taken, left_dense = choose_layers(model, settings)
    swap_layers(model, settings, taken, left_dense)
    larger = summarise(model).describe_growth()
    if larger:
        warnings.warn(larger, CSGWarning, stacklevel=2)
    return model


def materialise(model: nn.Module) -> nn.Module:
    """Turn all generated layers back into the convs they were, in place.

    Outputs and the dense network's state-dict keys stay the same.

    Returns:
        The same model.

    Raises:
        CSGError: the model has no generated layer.
    """
    convs = dict(generated_convs(model))
    if not convs:
        raise CSGError('nothing to materialise: the model has no generated layer; retrofit it first')
    roots = list(find_roots(model))
    registered = {id(generator) for _, _, bank in roots for generator in bank}
    for name, conv in convs.items():
        if id(conv.generator) not in registered:
            raise CSGError(f'{name}: its generator belongs to a larger model; materialise that model as a whole')
    groups: dict[int, list[CSGConv]] = defaultdict(list)
    for conv in convs.values():
        groups[id(conv.generator)].append(conv)
    weights: dict[CSGConv, Tensor] = {}
    for fed in groups.values():
        # At once, as an evaluation makes them: another size of product rounds otherwise.
        with torch.no_grad():
            weights.update(zip(fed, generate_weights(fed), strict=True))
    for _, root, _ in roots:
        detach_bank(root)
    for conv in convs.values():
        WATCH.done.discard(conv)
        swap_out(conv, weights.pop(conv))
    return model


def fit(model: nn.Module, weights: Mapping[str, Tensor]) -> dict[str, float]:
    """Load trained dense weights into a retrofitted model, in place.

    Generators and codes become those that come nearest to the weights, everything
    else is copied. ``model.load_state_dict`` does the same; so do ``load_from`` and
    ``init_cfg`` of mmengine. The parameters stay the same objects, so that an
    optimizer may exist already; do it before ``DistributedDataParallel``, which
    gives all processes the same. A fit is where training starts: on its own it
    loses much of a network's accuracy.

    Args:
        model: a retrofitted network.
        weights: the state dict of its dense twin.

    Returns:
        the relative error of each generated weight, by layer name.

    Raises:
        CSGError: the model is not retrofitted, or the weights are not those of
            its dense twin.
    """
    bank = find_bank(model)
    if bank is None:
        raise CSGError('nothing to fit: the model is not retrofitted; call csg_seg.retrofit on it first')
    _check_weights('fit', weights)
    _check_has_values('fit', model)
    wanted = dense_shapes(model)
    given = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    wrong = [f'{name} is missing' for name in wanted if name not in given]
    wrong += [f'{name} {shape} is in excess' for name, shape in given.items() if name not in wanted]
    wrong += [
        f'{name} is {given[name]}, not {shape}' for name, shape in wanted.items() if given.get(name, shape) != shape
    ]
    if wrong:
        raise CSGError(f"the weights are not those of the model's dense twin: {abridge(wrong)}")
    model.load_state_dict(weights)
    return bank.fitted


def load_state_dict(
    model: nn.Module, weights: Mapping[str, Tensor], *, reset: str | Sequence[str] = ()
) -> tuple[str, ...]:
    """Load a checkpoint into a retrofitted model of which some layers may differ, in place.

    A layer that ``reset`` names and that the checkpoint does not fit, such as a classifier of other classes, keeps its
    start values; if it is generated, its codes are drawn for the generator that was loaded. All else is loaded
    strictly. In a config it is ``reset`` of ``CSGModel`` or ``CSGHook``.

    Args:
        model: a retrofitted network.
        weights: the state dict of a CSG network, or of the dense twin of one, to which the model is fitted.
        reset: patterns of layer names, as for ``include``.

    Returns:
        the names of the layers that kept their start values.

    Raises:
        CSGError: the model is not retrofitted, a pattern names no layer, or the weights do not fit elsewhere.
    """
    bank = find_bank(model)
    if bank is None:
        raise CSGError('the model is not retrofitted; call csg_seg.retrofit on it first, or model.load_state_dict')
    _check_weights('load_state_dict', weights)
    with bank.reset.allow(read_patterns('load_state_dict', 'reset', reset) or ()):
        try:
            model.load_state_dict(weights)
        except RuntimeError as error:  # torch's, of all entries that differ
            raise CSGError(f'the weights do not fit the model: {" ".join(str(error).split())[:300]}') from None
    return bank.reset.layers


def _check_has_values(who: str, model: nn.Module) -> None:
    """Refuse a model on the meta device, which holds no values to compute with."""
    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            raise CSGError(f'{who}: {name} is on the meta device and has no values; build the model on another device')


def _check_weights(who: str, weights: Any) -> None:
    """Refuse what is no state dict, such as a whole checkpoint or its path."""
    if not isinstance(weights, Mapping) or not all(isinstance(each, Tensor) for each in weights.values()):
        what = "its entry 'state_dict'" if isinstance(weights, Mapping) and 'state_dict' in weights else 'a state dict'
        raise CSGError(f'{who} wants the weights by name, not this {type(weights).__name__}; give {what}')


def load_generators(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Give a retrofitted model the generators of another one, in place, and draw all its codes anew for them.

    A later :func:`fit` keeps them and fits codes alone; training moves them, unless the
    model's settings have ``freeze_generator``.

    Args:
        model: a retrofitted network, of any architecture.
        weights: the state dict of a network with generators of the same settings.

    Raises:
        CSGError: the model is not retrofitted, or the generators are others than its own.
    """
    bank = find_bank(model)
    if bank is None:
        raise CSGError('there is no generator in the model; call csg_seg.retrofit on it first')
    _check_weights('load_generators', weights)
    _check_has_values('load_generators', model)
    bank.load_generators(weights)


def dense_shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Return the state-dict shapes of a retrofitted model's dense twin."""
    convs = named_convs(model)
    stored = {f'{name}.{key}' for name, conv in convs.items() for key in conv.stored()}
    shapes = {f'{name}.weight': tuple(conv.weight_shape) for name, conv in convs.items()}
    for name, tensor in model.state_dict().items():
        if name not in stored and not name.startswith(f'{BANK}.'):
            shapes[name] = tuple(tensor.shape)
    return shapes


def swap_layers(
    model: nn.Module, settings: Sequence[Settings], taken: Mapping[str, int], left_dense: Mapping[str, str]
) -> None:
    """Swap the named convs for generated ones and attach their bank.

    Args:
        taken: name of each layer to generate, and the position of its generator.
        left_dense: name of each other conv, and why it stays dense.

    Raises:
        CSGError: a layer cannot be generated; the model is as it was.
    """
    convs = {name: cast(_ConvNd, model.get_submodule(name)) for name in taken}
    obstacles = _obstacles(model, convs)
    if obstacles:
        raise CSGError('; '.join(f'{name}: {why}' for name, why in obstacles.items()))
    first = next(iter(convs.values())).weight
    # One stream for a generator and its codes: two of the same seed would repeat each other.
    rngs = [torch.Generator().manual_seed(each.seed) for each in settings]
    generators = [build_generator(each, rng) for each, rng in zip(settings, rngs, strict=True)]
    for name, position in taken.items():
        swap_in(convs[name], generators[position], rngs[position])
    # After all codes, which are then the same with and without it.
    for name, position in taken.items():
        add_residual(cast(CSGConv, convs[name]), rngs[position])
    attach_bank(model, GeneratorBank(generators, left_dense).to(first))


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
            reason = reason_to_pass(name, conv, each, is_first=name == first)
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
            reason = reason_to_pass(name, conv, widest, is_first=name == first)
            if reason is not None:
                reasons[name] = reason
    return reasons


OTHER_KERNEL = 'no generator of its kernel size'


def reason_to_pass(name: str, conv: _ConvNd, settings: Settings, *, is_first: bool) -> str | None:
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


def check_root(model: nn.Module) -> None:
    """Refuse a model that cannot be retrofitted, or is already.

    Raises:
        CSGError: says which.
    """
    if not isinstance(model, nn.Module) or isinstance(model, (torch.jit.ScriptModule, GraphModule)):
        kind = 'class' if isinstance(model, type) else type(model).__name__
        raise CSGError(f'a {kind} came, which cannot be retrofitted; give the nn.Module that it is made of')
    for name, parameter in model.named_parameters():
        if isinstance(parameter, UninitializedParameter):
            raise CSGError(f'{name} has no shape before the first batch; run one batch through the model first')
    if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        raise CSGError(f'the model is already wrapped in {type(model).__name__}; take the network inside, model.module')
    if hasattr(model, '_orig_mod'):
        raise CSGError('the model is already compiled; take the network inside, model._orig_mod, and compile it again')
    if find_bank(model) is not None or any(generated_convs(model)):
        raise CSGError('the model is retrofitted already; materialise it before another retrofit')
    if hasattr(model, BANK):
        raise CSGError(f'the model has an attribute named {BANK!r}, where its generators go; rename that attribute')
    check_rootable(model)


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
