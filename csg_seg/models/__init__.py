"""Networks of the paper that no library of the OpenMMLab family has, in plain torch."""

from .mobilenet_v2 import CIFARMobileNetV2
from .resnet import CIFARResNet

__all__ = ['CIFARMobileNetV2', 'CIFARResNet']
