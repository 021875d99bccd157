"""Networks from the paper that mmpretrain lacks, in plain torch."""

from .mobilenet_v2 import CIFARMobileNetV2
from .resnet import CIFARResNet

__all__ = ['CIFARMobileNetV2', 'CIFARResNet']
