"""Train some parameters of a network and freeze the others."""

from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from csg_seg.errors import CSGError, abridge


def train_only(model: nn.Module, patterns: str | Sequence[str]) -> list[str]:
    """Train only parameters whose names match a pattern, in place; call it before the optimizer is made.

    A batch or instance norm without a parameter that trains uses its running statistics and leaves them as they are,
    in training too. So after ``train_only(model, '*.code')`` codes alone change, and an update of a compact checkpoint
    holds nothing else.

    Args:
        model: any network, usually a retrofitted one.
        patterns: shell-style patterns of parameter names, such as ``['*.code', '*.bn*']``; ``*`` also matches dots.

    Returns:
        The names of the parameters that train.

    Raises:
        CSGError: a pattern matches no parameter.
    """
    wanted = [patterns] if isinstance(patterns, str) else patterns
    if not isinstance(wanted, Sequence) or not all(isinstance(each, str) for each in wanted):
        raise CSGError(f"train_only: give patterns of parameter names, such as ['*.code']; got {patterns!r}")
    names = [name for name, _ in model.named_parameters()]
    for pattern in wanted:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise CSGError(f'train_only: {pattern!r} matches no parameter; there are {abridge(names, most=6)}')
    trained = [name for name in names if any(fnmatchcase(name, pattern) for pattern in wanted)]
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in trained)
    for module in model.modules():
        if isinstance(module, _NormBase) and module.running_mean is not None:
            hooks = module._forward_pre_hooks
            for key in [key for key, hook in hooks.items() if hook is _evaluate_frozen]:
                del hooks[key]
            # A norm without parameters trains if everything does.
            if len(trained) < len(names):
                module.register_forward_pre_hook(_evaluate_frozen)
    return trained


def _evaluate_frozen(norm: nn.Module, inputs: Any) -> None:
    """Let a norm without a parameter that trains use its running statistics."""
    if not any(each.requires_grad for each in norm.parameters()):
        norm.eval()
