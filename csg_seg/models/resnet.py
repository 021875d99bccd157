"""The ResNet of CIFAR-10, with parameter-free shortcuts."""

from torch import Tensor, nn
from torch.nn import functional

from ..errors import CSGError


class BasicBlock(nn.Module):
    """Two 3x3 convs beside a shortcut without parameters.

    Where the shape changes, the shortcut takes every second pixel and pads the
    channels with zeros, half before and half after: option A of He et al.,
    "Deep Residual Learning for Image Recognition", CVPR 2016, section 4.2.
    """

    def __init__(self, in_channels: int, channels: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.stride = stride
        self.padding = (channels - in_channels) // 2

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(n, in_channels, h, w)`` to ``(n, channels, h / stride, w / stride)``."""
        shortcut = x
        if self.stride > 1 or self.padding > 0:
            shortcut = x[:, :, :: self.stride, :: self.stride]
            shortcut = functional.pad(shortcut, (0, 0, 0, 0, self.padding, self.padding))
        x = functional.relu(self.bn1(self.conv1(x)))
        x = self.bn2(self.conv2(x))
        return functional.relu(x + shortcut)


class CIFARResNet(nn.Module):
    """ResNet-20, -32, -44, -56, -110 with 16, 32 and 64 channels, without the classifier.

    He et al., CVPR 2016, section 4.2.

    Args:
        depth: ``6 n + 2``, two convs in each of ``n`` blocks of three stages.

    Raises:
        CSGError: there is no network of such a depth.
    """

    def __init__(self, depth: int):
        super().__init__()
        blocks, rest = divmod(depth - 2, 6)
        if rest != 0 or blocks < 1:
            raise CSGError(f'depth {depth}: a CIFAR ResNet has 6 n + 2 layers; take 20, 32, 44, 56 or 110')
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = self._stage(blocks, in_channels=16, channels=16, stride=1)
        self.layer2 = self._stage(blocks, in_channels=16, channels=32, stride=2)
        self.layer3 = self._stage(blocks, in_channels=32, channels=64, stride=2)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode='fan_out', nonlinearity='relu')

    @staticmethod
    def _stage(blocks: int, *, in_channels: int, channels: int, stride: int) -> nn.Sequential:
        first = BasicBlock(in_channels, channels, stride)
        return nn.Sequential(first, *(BasicBlock(channels, channels, 1) for _ in range(blocks - 1)))

    def forward(self, x: Tensor) -> tuple[Tensor]:
        """Map images ``(n, 3, h, w)`` to one feature map ``(n, 64, h / 4, w / 4)``, in a tuple."""
        x = functional.relu(self.bn1(self.conv1(x)))
        return (self.layer3(self.layer2(self.layer1(x))),)
