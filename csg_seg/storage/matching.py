"""Check whether a compact checkpoint fits a model, and load its values."""

import math
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn

from csg_seg.errors import CSGError, abridge
from csg_seg.generators.registry import build_generator
from csg_seg.generators.settings import Settings, matches
from csg_seg.generators.signature import SIGNATURE
from csg_seg.generators.slices import grid
from csg_seg.layers.bank import BANK, bank_of, check_root, find_bank
from csg_seg.layers.conv import find_convs, generated_convs
from csg_seg.layers.state_dict_checks import check_reset

from .format import Compact, Layers, Shape, is_counter, is_setting

T = TypeVar('T')
OTHER_NETWORK = 'load it into the network it was made from, or name layers that may start anew in reset'


def generated_layers(model: nn.Module) -> Layers:
    """Return the generator position and weight shape of each layer of a retrofitted model."""
    position = {id(generator): index for index, generator in enumerate(bank_of(model))}
    return {name: (position[id(conv.generator)], tuple(conv.weight_shape)) for name, conv in generated_convs(model)}


def check_fits(model: nn.Module, compact: Compact, reset: Sequence[str]) -> Layers:
    """Check that a file fits a model, dense or retrofitted, apart from layers that match a pattern of ``reset``.

    Returns:
        The layers to generate if the model is dense, with their weight shapes in the model.

    Raises:
        CSGError: says what differs.
    """
    if find_bank(model) is None:
        check_root(model)
        layers = _layers_to_generate(model, compact, reset)
        wanted = _shapes_when_retrofitted(model, layers, compact.settings)
    else:
        layers = generated_layers(model)
        _check_generators(model, compact, reset)
        wanted = shapes_of(model.state_dict())
    check_reset(model, reset)
    check_shapes(_without(shapes_of(compact.tensors), reset), _without(wanted, reset))
    _check_values(model, compact, wanted)
    return layers


def check_shapes(
    stored: Mapping[str, Shape], wanted: Mapping[str, Shape], remedy: str = OTHER_NETWORK, where: str = 'the file'
) -> None:
    """Refuse state-dict entries that are missing, unexpected or of another shape; ``where`` names what has them."""
    unexpected, missing = stored.keys() - wanted.keys(), wanted.keys() - stored.keys()
    for problem, names in (('lacks', missing), ('has the unexpected entry', unexpected)):
        if names:
            raise CSGError(f'{where} {problem} {min(names)} ({len(names)} such entries); {remedy}')
    for name, shape in wanted.items():
        if stored[name] != shape and not is_setting(name):
            raise CSGError(f'{name} is {stored[name]} in {where} and {shape} in the model; {remedy}')


def load_values(model: nn.Module, compact: Compact, reset: Sequence[str]) -> None:
    """Load a file's tensors into a retrofitted model that they fit; in places on the meta device, they become its own.

    Layers that match a pattern of ``reset`` keep their start values where the file does not fit them.
    """
    # Starts from the model's own, whose layout versions are current: some modules would convert older ones.
    state_dict = model.state_dict()
    own = dict(state_dict)
    for name in own:
        if _matches_any(name, reset):
            del state_dict[name]
    state_dict.update(compact.tensors)
    is_meta = any(tensor.is_meta for tensor in own.values())
    tied = defaultdict(list)
    if is_meta:
        for name, tensor in compact.tensors.items():
            if name in own and not is_setting(name):
                state_dict[name] = tensor.to(own[name].dtype)
        for tensors in (model.named_parameters, model.named_buffers):
            for name, tensor in tensors(remove_duplicate=False):
                tied[id(tensor)].append(name)
    with bank_of(model).reset.allow(reset):
        model.load_state_dict(state_dict, assign=is_meta)
    for names in tied.values():
        # A buffer that is not persistent has its value from the one that is.
        first, *others = sorted(names, key=lambda name: name not in compact.tensors)
        for name in others:
            layer, _, key = name.rpartition('.')
            first_layer, _, first_key = first.rpartition('.')
            setattr(model.get_submodule(layer), key, getattr(model.get_submodule(first_layer), first_key))


def shapes_of(state_dict: Mapping[str, Tensor]) -> dict[str, Shape]:
    """Return the shape of each entry of a state dict, except a profiler's counters."""
    return {name: tuple(tensor.shape) for name, tensor in state_dict.items() if not is_counter(name)}


def _layers_to_generate(model: nn.Module, compact: Compact, reset: Sequence[str]) -> Layers:
    """Return the convs of a dense model that the file's generators take, with their weight shapes in the model.

    Raises:
        CSGError: a conv differs from the file's, and no pattern of ``reset`` matches it.
    """
    convs = dict(find_convs(model, remove_duplicate=False))
    layers = {}
    for name, (position, shape) in compact.layers.items():
        own = tuple(convs[name].weight.shape) if name in convs else None
        if own != shape and not _matches_any(name, reset):
            here = 'not in the model' if own is None else f'{own} in the model'
            raise CSGError(f'{name} is a conv of weight {shape} in the file and {here}; {OTHER_NETWORK}')
        if own is not None and own[2:] == compact.settings[position].kernel:
            layers[name] = (position, own)
    return layers


def _shapes_when_retrofitted(model: nn.Module, layers: Layers, settings: Sequence[Settings]) -> dict[str, Shape]:
    """Return the state-dict shapes that a dense model will have once these layers are generated."""
    shapes = shapes_of(model.state_dict())
    everywhere = list(model.named_modules(remove_duplicate=False))
    convs = dict(everywhere)
    for name, (position, weight_shape) in layers.items():
        each = settings[position]
        # A module in two places has two names in a state dict.
        for alias in [alias for alias, module in everywhere if module is convs[name]]:
            shapes.pop(f'{alias}.weight', None)
            shapes[f'{alias}.code'] = (math.prod(grid(weight_shape, each.slice_shape)), each.code_dim)
            if each.residual:
                shapes[f'{alias}.residual_out'] = (weight_shape[0], each.residual)
                shapes[f'{alias}.residual_in'] = (each.residual, math.prod(weight_shape[1:]))
    for position, each in enumerate(settings):
        state = build_generator(each, torch.Generator()).state_dict()
        shapes |= shapes_of({f'{BANK}.{position}.{name}': tensor for name, tensor in state.items()})
    return shapes


def _check_generators(model: nn.Module, compact: Compact, reset: Sequence[str]) -> None:
    """Refuse a retrofitted model whose generators or generated layers differ from the file's."""
    own = [generator.settings for generator in bank_of(model)]
    options = dict.fromkeys(key for each in (*compact.settings, *own) for key in each.options)
    for key in (*SIGNATURE, *options, 'residual'):
        stored, wanted = (
            [each.options.get(key, getattr(each, key, None)) for each in several] for several in (compact.settings, own)
        )
        if stored != wanted:
            raise CSGError(f'made with {key} {stored}, the model has {wanted}; load it into the dense network instead')
    differing = _without(generated_layers(model), reset).items() ^ _without(compact.layers, reset).items()
    if differing:
        raise CSGError(
            f'{min(differing)[0]} is generated differently in the file; load it into the dense network it was made from'
        )


def _check_values(model: nn.Module, compact: Compact, wanted: Collection[str]) -> None:
    """Refuse a network on the meta device for some of whose tensors the file has no value."""
    held = {*wanted} & {*compact.tensors}
    tensors = [*model.named_parameters(), *model.named_buffers()]
    left = [name for name, each in tensors if each.is_meta and name not in held and not name.startswith(f'{BANK}.')]
    # In place of a dense weight, the file may have codes.
    left = [name for name in left if f'{name.removesuffix("weight")}code' not in held]
    if left:
        raise CSGError(
            f'{abridge(left)}: on the meta device, and the file holds no value for it; '
            'build the network on another device'
        )


def _matches_any(name: str, patterns: Sequence[str]) -> bool:
    return any(matches(name, pattern) for pattern in patterns)


def _without(named: Mapping[str, T], patterns: Sequence[str]) -> dict[str, T]:
    return {name: each for name, each in named.items() if not _matches_any(name, patterns)}
