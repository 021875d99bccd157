"""MobileNetV2 for CIFAR-10, as in the code of the paper's authors."""

from torch import Tensor, nn
from torch.nn import functional

# expansion, channels, blocks, stride of the first block
STAGES = (
    (1, 16, 1, 1),
    (6, 24, 2, 1),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)


class InvertedResidual(nn.Module):
    """1x1 expansion, 3x3 depthwise conv, 1x1 projection.

    It differs from Sandler et al., CVPR 2018: the expansion is kept where its factor is 1, the activation is ReLU, and
    every block with stride 1 has a shortcut, a 1x1 conv where the number of channels changes.
    """

    def __init__(self, in_channels: int, channels: int, expansion: int, stride: int):
        super().__init__()
        width = in_channels * expansion
        self.conv1 = nn.Conv2d(in_channels, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride=stride, padding=1, groups=width, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, channels, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(channels)
        self.stride = stride
        self.shortcut = nn.Sequential()
        if stride == 1 and in_channels != channels:
            self.shortcut = nn.Sequential(nn.Conv2d(in_channels, channels, 1, bias=False), nn.BatchNorm2d(channels))

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(n, in_channels, h, w)`` to ``(n, channels, h / stride, w / stride)``."""
        out = functional.relu(self.bn1(self.conv1(x)))
        out = functional.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        return out + self.shortcut(x) if self.stride == 1 else out


class CIFARMobileNetV2(nn.Module):
    """MobileNetV2 for images of 32 x 32 pixels, without the classifier.

    The first conv and the second stage have stride 1; see :class:`InvertedResidual`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 32, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(32)
        layers = []
        in_channels = 32
        for expansion, channels, blocks, stride in STAGES:
            for position in range(blocks):
                layers.append(InvertedResidual(in_channels, channels, expansion, stride if position == 0 else 1))
                in_channels = channels
        self.layers = nn.Sequential(*layers)
        self.conv2 = nn.Conv2d(in_channels, 1280, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(1280)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode='fan_out', nonlinearity='relu')

    def forward(self, x: Tensor) -> tuple[Tensor]:
        """Map images ``(n, 3, h, w)`` to one feature map ``(n, 1280, h / 8, w / 8)``, in a tuple."""
        x = functional.relu(self.bn1(self.conv1(x)))
        x = self.layers(x)
        return (functional.relu(self.bn2(self.conv2(x))),)
