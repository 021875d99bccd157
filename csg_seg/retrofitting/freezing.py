"""Train some parameters of a network and freeze the others."""

from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from csg_seg.errors import CSGError, nearest
from csg_seg.layers.bank import check_module, find_roots

# On a model that has the hook, the names of norms that the hook switched to evaluation.
SWITCHED = '_csg_seg_switched_norms'


def train_only(model: nn.Module, patterns: str | Sequence[str]) -> list[str]:
    """Train only parameters whose names match a pattern, in place; call it before the optimizer is made.

    Whenever the model is called as a whole, a batch or instance norm without a parameter that trains uses its running
    statistics and leaves them as they are, in training too. So after ``train_only(model, '*.code')`` codes alone
    change, and an update of a compact checkpoint holds nothing else.

    Args:
        model: any network, usually a retrofitted one.
        patterns: shell-style patterns of parameter names, such as ``['*.code', '*.bn*']``; ``*`` also matches dots.
            Generators with ``freeze_generator`` stay frozen.

    Returns:
        The names of the parameters that train.

    Raises:
        CSGError: there is no pattern, or one matches no parameter.
    """
    check_module(model, 'train_only(model, patterns): the model')
    wanted = [patterns] if isinstance(patterns, str) else patterns
    if not isinstance(wanted, Sequence) or not wanted or not all(isinstance(each, str) for each in wanted):
        raise CSGError(f"train_only: give patterns of parameter names, such as ['*.code']; got {patterns!r}")
    everywhere = [*model.named_parameters(remove_duplicate=False)]  # a tied parameter has several names
    names = [name for name, _ in everywhere]
    for pattern in wanted:
        if not any(_names(pattern, name) for name in names):
            raise CSGError(f'train_only: {pattern!r} matches no parameter; {nearest(pattern, names)}')
    generators = [generator for _, _, bank in find_roots(model) for generator in bank]
    frozen = {id(each) for one in generators if one.settings.freeze_generator for each in one.parameters()}
    chosen = {id(each) for name, each in everywhere if any(_names(pattern, name) for pattern in wanted)}
    trained = []
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(id(parameter) in chosen - frozen)
        trained += [name] if parameter.requires_grad else []
    if SWITCHED not in vars(model):
        model.register_forward_pre_hook(_evaluate_frozen_norms)
    modules = dict(model.named_modules())
    for name in vars(model).get(SWITCHED, set()) & modules.keys():
        modules[name].train(model.training)
    vars(model)[SWITCHED] = set()
    return trained


def _names(pattern: str, name: str) -> bool:
    return name == pattern or fnmatchcase(name, pattern)  # a name may have brackets


def _evaluate_frozen_norms(model: nn.Module, inputs: Any) -> None:
    """Let norms without a parameter that trains use their running statistics.

    The norms are looked up in each pass, because they may be converted to SyncBN after the hook was registered.
    """
    everything_trains = all(each.requires_grad for each in model.parameters())
    for name, module in model.named_modules():
        if isinstance(module, _NormBase) and module.running_mean is not None:
            own = [each.requires_grad for each in module.parameters()]
            if module.training and not (any(own) if own else everything_trains):
                module.eval()
                vars(model)[SWITCHED].add(name)
