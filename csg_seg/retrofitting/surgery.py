"""Swap dense convs for generated ones, and back."""

import warnings
from collections.abc import Collection, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd

from csg_seg.errors import CSGError, CSGWarning
from csg_seg.generators.registry import build_generator
from csg_seg.generators.settings import Settings
from csg_seg.layers.ahead import generate_in_batches
from csg_seg.layers.bank import (
    GeneratorBank,
    attach_bank,
    check_module,
    check_root,
    check_unparametrised,
    detach_bank,
    detach_unused,
    find_roots,
)
from csg_seg.layers.conv import CSGConv, add_residual, check_plain, generated_convs, swap_in, swap_out
from csg_seg.layers.watch import WATCH
from csg_seg.report import summarise

from .automatic import resolve
from .selection import Reason, choose_layers, find_obstacles

NORMS = (_NormBase, nn.GroupNorm, nn.LayerNorm)
CSG = Mapping[str, Any] | Sequence[Mapping[str, Any]] | str


def retrofit(model: nn.Module, csg: CSG) -> nn.Module:
    """Generate the weights of a model's convs from shared generators, in place.

    Call it before the optimizer is built and before the model is wrapped in ``DistributedDataParallel``
    (``DataParallel`` is not supported). The chosen layers lose their trained weights: they are initialised at Kaiming
    variance, from the seeds of the dicts. Call :func:`csg_seg.fit` to start from trained weights; the first step of an
    optimizer warns if a network that seems trained is trained from new values.

    Args:
        model: any network with convs of one to three dimensions, grouped and transposed ones included, and
            subclasses of them that compute with their own ``weight``.
        csg: a dict of settings (see :class:`csg_seg.generators.settings.Settings`), or a list of dicts for several
            generators; each layer goes to the first dict that takes it. ``dict(ratio=4)`` finds the settings by
            :func:`csg_seg.suggest`, and so does ``'auto'``, with a ratio that suits the network.

    Returns:
        The same model.

    Raises:
        CSGError: a setting is wrong, a dict takes no layer, or a layer cannot be generated.
    """
    check_root(model)
    settings = [Settings.from_dict(each, position=position) for position, each in enumerate(resolve(model, csg))]
    taken, left_dense = choose_layers(model, settings)
    trained = _trained_layers(model, taken)
    swap_layers(model, settings, taken, left_dense)
    WATCH.note_lost({name: cast(CSGConv, model.get_submodule(name)) for name in trained})
    growth = summarise(model).describe_growth()
    if growth:
        warnings.warn(growth, CSGWarning, stacklevel=2)
    return model


def materialise(model: nn.Module) -> nn.Module:
    """Turn all generated layers back into plain convs, in place.

    The outputs stay the same, and the state dict has the keys of the dense network again. To train on, make a new
    optimizer, and wrap the network in ``DistributedDataParallel`` again.

    Returns:
        The same model.

    Raises:
        CSGError: the model has no generated layer, or a code or generator is pruned or parametrised.
    """
    check_module(model, 'materialise(model): the model')
    convs = dict(generated_convs(model))
    if not convs:
        raise CSGError('nothing to materialise: the model has no generated layer; retrofit it first')
    check_plain(convs)
    roots = list(find_roots(model))
    if any(bank.accumulation.is_on for _, _, bank in roots):
        raise CSGError('gradients are being accumulated; materialise after the with block')
    registered = {generator for _, _, bank in roots for generator in bank}
    for name, conv in convs.items():
        if conv.generator not in registered:
            raise CSGError(f'{name}: its generator belongs to a larger model; materialise that model as a whole')
    weights: dict[CSGConv, Tensor] = {}
    for generator in {conv.generator for conv in convs.values()}:
        layers = [conv for conv in convs.values() if conv.generator is generator]
        # In one batch, as in evaluation: a product of another size rounds differently.
        device = layers[0].code.device.type
        with torch.no_grad(), torch.autocast(device, enabled=False):
            weights.update(zip(layers, generate_in_batches(layers), strict=True))
    for _, root, _ in roots:
        check_unparametrised(root, 'call parametrize.remove_parametrizations first')
    WATCH.warn_of_lost(convs.values(), stacklevel=2)
    stored = [each for conv in convs.values() for each in conv.stored().values()]
    for _, root, _ in roots:
        detach_bank(root)
    for conv in convs.values():
        WATCH.done.discard(conv)
        swap_out(conv, weights.pop(conv))
    for _, _, bank in roots:
        detach_unused(bank)
    WATCH.note_replaced(stored)
    if isinstance(model, nn.parallel.DistributedDataParallel):
        text = (
            'the weights of this DistributedDataParallel are new, and it exchanges no gradients of them; to train on, '
            'wrap model.module again'
        )
        warnings.warn(text, CSGWarning, stacklevel=2)
    return model


def swap_layers(
    model: nn.Module, settings: Sequence[Settings], taken: Mapping[str, int], left_dense: Mapping[str, Reason]
) -> None:
    """Swap the named convs for generated ones, and attach the bank of their generators.

    Args:
        model: dense; if an error is raised, it is unchanged.
        settings: one for each generator.
        taken: the position of the generator, by name of each layer to generate.
        left_dense: the reason, by name of each other conv.

    Raises:
        CSGError: a layer cannot be generated, or the layers to generate have several types or devices.
    """
    convs = {name: cast(_ConvNd, model.get_submodule(name)) for name in taken}
    obstacles = find_obstacles(model, convs)
    if obstacles:
        raise CSGError('; '.join(f'{name}: {why}' for name, why in obstacles.items()))
    first = next(iter(convs.values())).weight
    for name, conv in convs.items():
        if (conv.weight.dtype, conv.weight.device) != (first.dtype, first.device):
            raise CSGError(
                f'{name}: its weight is {conv.weight.dtype} on {conv.weight.device}, that of {next(iter(convs))} is '
                f'{first.dtype} on {first.device}; give all one type and device before retrofit, or exclude it'
            )
    # A generator and its codes share one stream of random numbers: two streams with the same seed would be equal.
    rngs = [torch.Generator().manual_seed(each.seed) for each in settings]
    generators = [build_generator(each, rng) for each, rng in zip(settings, rngs, strict=True)]
    WATCH.note_replaced(conv.weight for conv in convs.values())
    for name, position in taken.items():
        swap_in(convs[name], generators[position], rngs[position])
    # Last, so that the codes are the same with and without residuals.
    for name, position in taken.items():
        add_residual(cast(CSGConv, convs[name]), rngs[position])
    attach_bank(model, GeneratorBank(generators, left_dense).to(first))


def _trained_layers(model: nn.Module, names: Collection[str]) -> list[str]:
    """Return the convs beside a norm whose weights differ from one another, as they do after a training alone."""
    norms: dict[str, bool] = {}
    for name in names:
        parent = name.rpartition('.')[0]
        if parent not in norms:
            weights = [each.weight for each in model.get_submodule(parent).children() if isinstance(each, NORMS)]
            norms[parent] = any(each is not None and not each.is_meta and each.min() != each.max() for each in weights)
    return [name for name in names if norms[name.rpartition('.')[0]]]
