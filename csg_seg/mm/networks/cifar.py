"""The paper's networks as backbones, where mmpretrain's own do not do: another stem, or another start."""

from typing import Any

from mmcv.cnn import ConvModule
from mmengine.model import BaseModule
from mmengine.registry import MODELS
from mmpretrain.models import DenseNet, ShuffleNetV2
from torch import nn

from csg_seg import models
from csg_seg.errors import CSGError


@MODELS.register_module()
class CIFARResNet(models.CIFARResNet, BaseModule):
    """:class:`csg_seg.models.CIFARResNet` with mmengine's ``init_cfg``."""

    def __init__(self, depth: int, zeros: str = 'after', base_channels: int = 16, init_cfg: dict | None = None):
        super().__init__(depth, zeros, base_channels)
        self.init_cfg = init_cfg


@MODELS.register_module()
class CIFARMobileNetV2(models.CIFARMobileNetV2, BaseModule):
    """:class:`csg_seg.models.CIFARMobileNetV2` with mmengine's ``init_cfg``."""

    def __init__(self, init_cfg: dict | None = None):
        super().__init__()
        self.init_cfg = init_cfg


@MODELS.register_module()
class CIFARDenseNet(DenseNet):
    """DenseNet-BC for 32 x 32 pixels: three blocks, a 3x3 conv for a stem.

    Huang et al., "Densely Connected Convolutional Networks", CVPR 2017.

    Args:
        depth: ``6 n + 4``; each of three blocks has ``n`` bottlenecks.
        growth_rate: channels that each bottleneck adds; the stem has twice as many.
        kwargs: as :class:`mmpretrain.models.DenseNet`.

    Raises:
        CSGError: there is no network of such a depth.
    """

    def __init__(self, depth: int, growth_rate: int, **kwargs: Any):
        blocks, rest = divmod(depth - 4, 6)
        if rest or blocks < 1:
            raise CSGError(f'depth {depth}: a CIFAR DenseNet-BC has 6 n + 4 layers; take 40 or 100')
        stem = 2 * growth_rate
        super().__init__(arch=dict(growth_rate=growth_rate, depths=[blocks] * 3, init_channels=stem), **kwargs)
        self.stem = nn.Conv2d(3, stem, 3, padding=1, bias=False)


@MODELS.register_module()
class CIFARShuffleNetV2(ShuffleNetV2):
    """ShuffleNetV2 for 32 x 32 pixels: a stem of stride 1, no pooling.

    Ma et al., "ShuffleNet V2", ECCV 2018. Convs start at Kaiming variance;
    mmpretrain's start values, made for ImageNet, are small for this stem.

    Args:
        kwargs: as :class:`mmpretrain.models.ShuffleNetV2`.
    """

    def __init__(self, **kwargs: Any):
        super().__init__(**kwargs)
        stem = self.conv1
        self.conv1 = ConvModule(3, stem.out_channels, 3, padding=1, norm_cfg=self.norm_cfg, act_cfg=self.act_cfg)
        self.maxpool = nn.Identity()

    def init_weights(self) -> None:
        """Let every conv start as mmcv does, and follow ``init_cfg``."""
        BaseModule.init_weights(self)
