"""The paper's CIFAR-10 networks as backbones; mmpretrain's have other stems or start values."""

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
    """DenseNet-BC for images of 32 x 32 pixels, with three blocks and a 3x3 conv as stem.

    Huang et al., "Densely Connected Convolutional Networks", CVPR 2017.

    Args:
        depth: number of layers, ``6 n + 4``; each of the three blocks has ``n`` bottlenecks.
        growth_rate: number of channels that each bottleneck adds; the stem has twice as many.
        kwargs: arguments of :class:`mmpretrain.models.DenseNet`.

    Raises:
        CSGError: ``depth`` is not ``6 n + 4``.
    """

    def __init__(self, depth: int, growth_rate: int, **kwargs: Any):
        blocks, rest = divmod(depth - 4, 6)
        if rest or blocks < 1:
            raise CSGError(f'depth {depth}: a CIFAR DenseNet-BC has 6 n + 4 layers; use 40 or 100')
        stem = 2 * growth_rate
        super().__init__(arch=dict(growth_rate=growth_rate, depths=[blocks] * 3, init_channels=stem), **kwargs)
        self.stem = nn.Conv2d(3, stem, 3, padding=1, bias=False)


@MODELS.register_module()
class CIFARShuffleNetV2(ShuffleNetV2):
    """ShuffleNetV2 for images of 32 x 32 pixels: the stem has stride 1 and no pooling.

    Ma et al., "ShuffleNet V2", ECCV 2018. Convs start with Kaiming variance, because
    mmpretrain's start values for ImageNet are too small for this stem.

    Args:
        kwargs: arguments of :class:`mmpretrain.models.ShuffleNetV2`.
    """

    def __init__(self, **kwargs: Any):
        super().__init__(**kwargs)
        channels = self.get_submodule('conv1').out_channels
        self.conv1 = ConvModule(3, channels, 3, padding=1, norm_cfg=self.norm_cfg, act_cfg=self.act_cfg)
        self.maxpool = nn.Identity()

    def init_weights(self) -> None:
        """Initialise every conv as mmcv does, then apply ``init_cfg``."""
        BaseModule.init_weights(self)
