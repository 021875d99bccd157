"""ChannelsLastHook: compute in channels-last memory format."""

import torch
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from mmengine.runner import Runner
from torch import nn

from csg_seg.mm.model import bare_model


@HOOKS.register_module()
class ChannelsLastHook(Hook):
    """Convert weights and images to channels-last memory format, which makes convs faster on most devices."""

    priority = 'VERY_LOW'

    def before_run(self, runner: Runner) -> None:
        """Convert the weights, and every batch of images that enters the backbone."""
        model = bare_model(runner.model)
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        model.get_submodule('backbone').register_forward_pre_hook(_to_channels_last)


def _to_channels_last(module: nn.Module, inputs: tuple) -> tuple:
    return tuple(each.to(memory_format=torch.channels_last) for each in inputs)
