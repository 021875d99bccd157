"""Depthwise-separable convs: ``model=dict(type='SeparableModel', base_type='EncoderDecoder', ...)``."""

from collections.abc import Callable, Collection
from fnmatch import fnmatchcase
from functools import partial
from typing import Any, cast

from mmengine.registry import MODELS
from torch import Tensor, nn

from csg_seg.errors import CSGError
from csg_seg.layers.conv import kaiming_std

MakeLayer = Callable[[nn.Conv2d], nn.Module]


@MODELS.register_module()
def SeparableModel(base_type: str, **base: Any) -> nn.Module:
    """Build the model of the base config and replace its 3x3 convs, except the first, by :class:`SeparableConv`.

    The widths of the base config set the size.

    Args:
        base_type: registered name of the model to build.
        base: arguments of ``base_type``.

    Raises:
        CSGError: the model has no such conv.
    """
    model = MODELS.build(dict(type=base_type, **base))
    replace_convs(model, SeparableConv, kernels={(3, 3)})
    model.__dict__['init_weights'] = partial(_init_weights, model)
    return model


def _init_weights(model: Any) -> None:
    type(model).init_weights(model)
    # mmengine's Kaiming initialiser takes depthwise convs for ungrouped ones.
    for module in model.modules():
        if isinstance(module, SeparableConv):
            module.reset_parameters()


class SeparableConv(nn.Module):
    """A depthwise conv with BatchNorm and ReLU, then a pointwise conv.

    Howard et al., "MobileNets", 2017, arXiv 1704.04861; the order is that of mmcv's ``DepthwiseSeparableConvModule``.
    The BatchNorm and ReLU of the replaced conv follow the pointwise conv.

    Args:
        conv: the conv that it replaces.
    """

    def __init__(self, conv: nn.Conv2d):
        super().__init__()
        channels = conv.in_channels
        place: dict[str, Any] = dict(stride=conv.stride, padding=conv.padding, dilation=conv.dilation)
        kernel = cast(tuple[int, int], conv.kernel_size)
        self.depthwise = nn.Conv2d(channels, channels, kernel, groups=channels, bias=False, **place)
        self.norm = nn.BatchNorm2d(channels)
        self.activate = nn.ReLU(inplace=True)
        self.pointwise = nn.Conv2d(channels, conv.out_channels, 1, bias=conv.bias is not None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw start values at Kaiming variance."""
        for conv in (self.depthwise, self.pointwise):
            nn.init.normal_(conv.weight, std=kaiming_std(conv))
        if self.pointwise.bias is not None:
            nn.init.zeros_(self.pointwise.bias)

    def forward(self, images: Tensor) -> Tensor:
        """Map ``(n, in, h, w)`` to ``(n, out, h', w')``."""
        return self.pointwise(self.activate(self.norm(self.depthwise(images))))


def replace_convs(
    model: nn.Module, make: MakeLayer, *, kernels: Collection[tuple[int, ...]], exclude: str = ''
) -> dict[str, nn.Module]:
    """Replace, in place, the convs that :func:`find_replaceable` returns.

    Args:
        model: the network.
        make: returns the layer that replaces a conv.
        kernels: kernel sizes of the convs to replace.
        exclude: shell-style pattern of names of convs to leave.

    Returns:
        the new layers by name.

    Raises:
        CSGError: the model has no such conv.
    """
    made = {name: make(conv) for name, conv in find_replaceable(model, kernels=kernels, exclude=exclude).items()}
    for name, layer in made.items():
        parent, _, key = name.rpartition('.')
        setattr(model.get_submodule(parent), key, layer)
    return made


def find_replaceable(
    model: nn.Module, *, kernels: Collection[tuple[int, ...]], exclude: str = ''
) -> dict[str, nn.Conv2d]:
    """Return, by name, the ungrouped convs of some kernel sizes except the first, which CSG leaves dense, too.

    Raises:
        CSGError: the model has no such conv.
    """
    convs = {name: module for name, module in model.named_modules() if isinstance(module, nn.Conv2d)}
    found = {
        name: conv
        for name, conv in list(convs.items())[1:]
        if conv.kernel_size in kernels and conv.groups == 1 and not fnmatchcase(name, exclude)
    }
    if not found:
        wanted = ' or '.join(f'{height}x{width}' for height, width in kernels)
        raise CSGError(f'the model has no {wanted} conv to replace; use a network with such convs')
    return found
