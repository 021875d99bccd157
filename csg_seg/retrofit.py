"""Choose layers; dense to generated, and back to plain convs."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter
from torch.nn.utils.parametrize import is_parametrized

from .bank import BANK, GeneratorBank, attach_bank, detach_bank, find_bank, find_roots
from .conv import CSGConv2d, add_residual, generated_convs, named_convs, swap_in, swap_out
from .errors import CSGError, abridge
from .generator import build_generator
from .settings import Settings, matches
from .slices import grid

CSG = Mapping[str, Any] | Sequence[Mapping[str, Any]]


def retrofit(model: nn.Module, csg: CSG) -> nn.Module:
    """Make the weights of a model's convs from shared generators, in place.

    Do it before the model is wrapped for data parallelism (use
    ``DistributedDataParallel``, not ``DataParallel``) and before the optimizer is
    built. Trained weights of the chosen layers are not kept: they start anew, at
    Kaiming variance, drawn from the dicts' own seeds.

    Args:
        model: any network of ``nn.Conv2d`` layers.
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
    return model


def materialise(model: nn.Module) -> nn.Module:
    """Turn all generated layers back into plain ``nn.Conv2d``, in place.

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
    for conv in convs.values():
        swap_out(conv)
    for _, root, _ in roots:
        detach_bank(root)
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
    if not isinstance(weights, Mapping) or not all(isinstance(each, Tensor) for each in weights.values()):
        what = "its entry 'state_dict'" if isinstance(weights, Mapping) and 'state_dict' in weights else 'a state dict'
        raise CSGError(f'fit wants the weights by name, not this {type(weights).__name__}; give {what}')
    wanted = dense_shapes(model)
    given = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    wrong = [f'{name} is missing' for name in wanted if name not in given]
    wrong += [f'{name} {shape} is in excess' for name, shape in given.items() if name not in wanted]
    wrong += [
        f'{name} is {given[name]}, not {shape}' for name, shape in wanted.items() if given.get(name, shape) != shape
    ]
    if wrong:
        raise CSGError(f"the weights are not those of the model's dense twin: {abridge(wrong)}")
    model.load_state_dict(dict(weights))
    return bank.fitted


def load_generators(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Give a retrofitted model the generators of another one, in place, and draw all its codes anew for them.

    With ``freeze_generator`` in the model's settings they stay as they are.

    Args:
        model: a retrofitted network, of any architecture.
        weights: the state dict of a network with generators of the same settings.

    Raises:
        CSGError: the model is not retrofitted, or the generators are others than its own.
    """
    bank = find_bank(model)
    if bank is None:
        raise CSGError('there is no generator in the model; call csg_seg.retrofit on it first')
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
    convs = {name: cast(nn.Conv2d, model.get_submodule(name)) for name in taken}
    _check_can_generate(convs)
    _check_no_sharing(model, convs)
    first = next(iter(convs.values())).weight
    # One stream for a generator and its codes: two of the same seed would repeat each other.
    rngs = [torch.Generator().manual_seed(each.seed) for each in settings]
    generators = [build_generator(each, rng) for each, rng in zip(settings, rngs, strict=True)]
    for name, position in taken.items():
        swap_in(convs[name], generators[position], rngs[position])
    # After all codes, which are then the same with and without it.
    for name, position in taken.items():
        add_residual(cast(CSGConv2d, convs[name]), rngs[position])
    attach_bank(model, GeneratorBank(generators, left_dense).to(first))


def choose_layers(model: nn.Module, settings: Sequence[Settings]) -> tuple[dict[str, int], dict[str, str]]:
    """Decide which convs are generated, by which generator, and why the others are not.

    Returns:
        ``taken``, layer name to generator position, and ``left_dense``, layer name to reason.

    Raises:
        CSGError: a dict takes no layer, a pattern names none, or a chosen layer cannot be generated.
    """
    convs = {name: module for name, module in model.named_modules() if isinstance(module, nn.Conv2d)}
    first = next(iter(convs), None)
    for position, each in enumerate(settings):
        _check_patterns(position, each, convs)
    taken: dict[str, int] = {}
    left_dense: dict[str, str] = {}
    for name, conv in convs.items():
        for position, each in enumerate(settings):
            reason = _reason_to_pass(name, conv, each, is_first=name == first)
            if reason is None:
                taken[name] = position
                left_dense.pop(name, None)
                break
            if not (reason == _OTHER_KERNEL and name in left_dense):
                left_dense[name] = reason
    for position, each in enumerate(settings):
        if position not in taken.values():
            raise CSGError(f'csg[{position}] takes no layer: {_why_nothing(each, convs, taken, left_dense)}')
    return taken, left_dense


def generable(model: nn.Module) -> tuple[dict[str, nn.Conv2d], dict[str, str]]:
    """Find the convs that a generator takes without being named in full.

    Returns:
        ``convs``, layer name to conv, and ``refused``, the layers that would be
        taken too but cannot be generated: layer name to reason.
    """
    everything = {name: module for name, module in model.named_modules() if isinstance(module, nn.Conv2d)}
    first = next(iter(everything), None)
    convs: dict[str, nn.Conv2d] = {}
    refused: dict[str, str] = {}
    for name, conv in everything.items():
        one_slice = (max(1, conv.out_channels), max(1, conv.in_channels), *conv.kernel_size)
        widest = Settings(slice_shape=cast(tuple[int, int, int, int], one_slice), code_dim=1)
        if _reason_to_pass(name, conv, widest, is_first=name == first) is not None:
            continue
        try:
            _check_can_generate({name: conv})
            _check_no_sharing(model, {name: conv})
            convs[name] = conv
        except CSGError as error:
            refused[name] = str(error)
    return convs, refused


_OTHER_KERNEL = 'no generator of its kernel size'


def _reason_to_pass(name: str, conv: nn.Conv2d, settings: Settings, *, is_first: bool) -> str | None:
    """Say why a generator does not take a conv; None when it takes it."""
    if conv.kernel_size != settings.kernel:
        return _OTHER_KERNEL
    if conv.groups != 1:
        return 'grouped'
    if any(matches(name, pattern) for pattern in settings.exclude):
        return 'excluded'
    if settings.include is not None and not any(matches(name, pattern) for pattern in settings.include):
        return 'not included'
    if is_first and name not in (settings.include or ()):
        return "the network's first conv"
    if isinstance(conv.weight, nn.Parameter) and not conv.weight.requires_grad:
        return 'frozen (requires_grad is False)'
    rows, cols = grid((conv.out_channels, conv.in_channels, *conv.kernel_size), settings.slice_shape)
    fan_in = conv.in_channels * conv.kernel_size[0] * conv.kernel_size[1]
    generated = rows * cols * settings.code_dim + settings.residual * (conv.out_channels + fan_in)
    dense = conv.out_channels * fan_in
    if generated >= dense:
        return f'costs more generated: {generated:,} against {dense:,}'
    return None


def check_root(model: nn.Module) -> None:
    """Refuse a model that cannot be retrofitted, or is already.

    Raises:
        CSGError: says which.
    """
    if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        raise CSGError(f'the model is already wrapped in {type(model).__name__}; take the network inside, model.module')
    if hasattr(model, '_orig_mod'):
        raise CSGError('the model is already compiled; take the network inside, model._orig_mod, and compile it again')
    if find_bank(model) is not None or any(generated_convs(model)):
        raise CSGError('the model is retrofitted already; materialise it before another retrofit')
    if hasattr(model, BANK):
        raise CSGError(f'the model has an attribute named {BANK!r}, where its generators go; rename that attribute')


def _check_can_generate(convs: Mapping[str, nn.Conv2d]) -> None:
    """Refuse all convs at once that would lose something by the swap."""
    obstacles = {name: obstacle for name, conv in convs.items() if (obstacle := _obstacle(conv))}
    if obstacles:
        first, obstacle = next(iter(obstacles.items()))
        count = f' ({len(obstacles)} such layers)' if len(obstacles) > 1 else ''
        raise CSGError(f'{first}: {obstacle}{count}; leave dense with exclude={list(obstacles)}')


def _obstacle(conv: nn.Conv2d) -> str | None:
    kind = type(conv)
    own_forward = kind.forward is not nn.Conv2d.forward or kind._conv_forward is not nn.Conv2d._conv_forward
    if own_forward or 'forward' in vars(conv):
        return f'{kind.__name__} brings its own forward, which a generated layer would lose'
    computed = is_parametrized(conv) or not isinstance(conv._parameters.get('weight'), nn.Parameter)
    if computed or isinstance(conv.weight, UninitializedParameter):
        return f'the weight of this {kind.__name__} is computed (parametrised, pruned or lazy)'
    if conv.groups != 1:
        return f'a conv of {conv.groups} groups cannot be generated'
    return None


def _check_no_sharing(model: nn.Module, convs: Mapping[str, nn.Conv2d]) -> None:
    """Refuse weights that something else in the model holds too: it would keep the dense one."""
    holders = defaultdict(list)
    for name, module in model.named_modules():
        for key, parameter in module._parameters.items():
            holders[id(parameter)].append(f'{name}.{key}' if name else key)
    for name, conv in convs.items():
        others = [other for other in holders[id(conv.weight)] if other != f'{name}.weight']
        if others:
            raise CSGError(f"{name}: its weight is also {others[0]}; leave it dense with exclude=['{name}']")


def _check_patterns(position: int, settings: Settings, convs: Mapping[str, nn.Conv2d]) -> None:
    for key in ('include', 'exclude'):
        for pattern in getattr(settings, key) or ():
            if convs and not any(matches(name, pattern) for name in convs):
                raise CSGError(
                    f'csg[{position}]: {key} pattern {pattern!r} names no conv of the model; '
                    f'names look like {list(convs)[-1]!r}'
                )


def _why_nothing(
    settings: Settings,
    convs: Mapping[str, nn.Conv2d],
    taken: Mapping[str, int],
    left_dense: Mapping[str, str],
) -> str:
    """Explain that one dict takes no layer, and what to do."""
    fitting = [name for name, conv in convs.items() if conv.kernel_size == settings.kernel]
    if not fitting:
        kh, kw = settings.kernel
        kernels = sorted({conv.kernel_size for conv in convs.values()})
        if not kernels:
            return 'the model has no nn.Conv2d at all; retrofit a network that has'
        found = ', '.join('x'.join(map(str, kernel)) for kernel in kernels)
        return (
            f'slice_shape {settings.slice_shape} fits {kh}x{kw} kernels, the convs of the model have {found}; '
            'change the last two numbers of slice_shape'
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
