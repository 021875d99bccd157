"""The DeepLabV3+ head of the paper, without separable convs."""

from typing import Any

import torch
from mmcv.cnn import ConvModule
from mmengine.registry import MODELS
from mmseg.models.decode_heads import ASPPHead
from torch import Tensor, nn
from torch.nn import functional


@MODELS.register_module()
class DeepLabV3PlusHead(ASPPHead):
    """ASPP, followed by a decoder that adds low-level features.

    Chen et al., "Encoder-Decoder with Atrous Separable Convolution", ECCV 2018. As in Omidvar et al.,
    AISTATS 2021, no conv is separable; mmsegmentation has the variant with separable convs.

    Args:
        low_level_in_channels: channels of the low-level features.
        low_level_index: their position in the backbone's outputs.
        low_level_channels: channels that they are reduced to.
        kwargs: arguments of mmsegmentation's ``ASPPHead``.
    """

    def __init__(
        self, low_level_in_channels: int, low_level_index: int = 0, low_level_channels: int = 48, **kwargs: Any
    ):
        super().__init__(**kwargs)
        settings = dict(conv_cfg=self.conv_cfg, norm_cfg=self.norm_cfg, act_cfg=self.act_cfg)
        branches = len(self.dilations) + 1
        self.low_level_index = low_level_index
        self.bottleneck = nn.Sequential(
            ConvModule(branches * self.channels, self.channels, 1, **settings), nn.Dropout(0.5)
        )
        self.low_level = ConvModule(low_level_in_channels, low_level_channels, 1, **settings)
        self.decoder = nn.Sequential(
            ConvModule(self.channels + low_level_channels, self.channels, 3, padding=1, **settings),
            nn.Dropout(0.5),
            ConvModule(self.channels, self.channels, 3, padding=1, **settings),
        )

    def forward(self, inputs: tuple[Tensor, ...]) -> Tensor:
        """Return logits ``(n, num_classes, h, w)`` at the resolution of the low-level features."""
        low_level = self.low_level(inputs[self.low_level_index])
        features = self._forward_feature(inputs)
        features = functional.interpolate(
            features, size=low_level.shape[2:], mode='bilinear', align_corners=self.align_corners
        )
        return self.cls_seg(self.decoder(torch.cat([features, low_level], dim=1)))
