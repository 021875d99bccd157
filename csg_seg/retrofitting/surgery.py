"""Dense to generated, and back."""

import warnings
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.nn.modules.conv import _ConvNd
from torch.nn.parameter import UninitializedParameter

from csg_seg.errors import CSGError, CSGWarning
from csg_seg.generators.registry import build_generator
from csg_seg.generators.settings import Settings
from csg_seg.layers.bank import BANK, GeneratorBank, attach_bank, detach_bank, find_bank, find_roots
from csg_seg.layers.conv import CSGConv, add_residual, generate_weights, generated_convs, swap_in, swap_out
from csg_seg.layers.root import check_rootable
from csg_seg.layers.watch import WATCH
from csg_seg.report import summarise

from .selection import _obstacles, choose_layers

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
