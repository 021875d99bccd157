"""ResNet for CIFAR-10, with shortcuts without parameters."""

from torch import Tensor, nn
from torch.nn import functional

from csg_seg.errors import CSGError


class BasicBlock(nn.Module):
    """Two 3x3 convs and a shortcut without parameters.

    Where the shape changes, the shortcut takes every second pixel and pads the channels with zeros: option A of He et
    al., "Deep Residual Learning for Image Recognition", CVPR 2016, section 4.2, which does not say on which side.
    """

    def __init__(self, in_channels: int, channels: int, *, stride: int, zeros: str):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.stride = stride
        added = channels - in_channels
        self.zeros = (0, added) if zeros == 'after' else (added // 2, added - added // 2)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(n, in_channels, h, w)`` to ``(n, channels, h / stride, w / stride)``."""
        shortcut = x
        if self.stride > 1:
            shortcut = functional.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, *self.zeros))
        x = functional.relu(self.bn1(self.conv1(x)))
        x = self.bn2(self.conv2(x))
        return functional.relu(x + shortcut)


class CIFARResNet(nn.Module):
    """ResNet-20, -32, -44, -56, -110, without the classifier.

    He et al., CVPR 2016, section 4.2.

    Args:
        depth: ``6 n + 2``: three stages of ``n`` blocks with two convs each.
        zeros: where a shortcut pads its channels: 'after' the others, as the CSG paper's authors do, or 'around'
            them, half on each side.
        base_channels: channels of the first stage; each later stage has twice as many.

    Raises:
        CSGError: there is no network with this depth.
    """

    def __init__(self, depth: int, zeros: str = 'after', base_channels: int = 16):
        super().__init__()
        if zeros not in ('after', 'around'):
            raise CSGError(f"zeros must be 'after' or 'around'; got {zeros!r}")
        blocks, rest = divmod(depth - 2, 6) if isinstance(depth, int) else (0, 0)
        if rest or blocks < 1:
            raise CSGError(f'depth {depth}: a CIFAR ResNet has 6 n + 2 layers; use 20, 32, 44, 56 or 110')
        first, second, third = (base_channels * factor for factor in (1, 2, 4))
        self.conv1 = nn.Conv2d(3, first, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(first)
        self.layer1 = _stage(blocks, first, first, stride=1, zeros=zeros)
        self.layer2 = _stage(blocks, first, second, stride=2, zeros=zeros)
        self.layer3 = _stage(blocks, second, third, stride=2, zeros=zeros)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode='fan_out', nonlinearity='relu')

    def forward(self, x: Tensor) -> tuple[Tensor]:
        """Map images ``(n, 3, h, w)`` to one feature map ``(n, 4 * base_channels, h / 4, w / 4)``, in a tuple."""
        x = functional.relu(self.bn1(self.conv1(x)))
        return (self.layer3(self.layer2(self.layer1(x))),)


def _stage(blocks: int, in_channels: int, channels: int, *, stride: int, zeros: str) -> nn.Sequential:
    first = BasicBlock(in_channels, channels, stride=stride, zeros=zeros)
    return nn.Sequential(first, *(BasicBlock(channels, channels, stride=1, zeros=zeros) for _ in range(blocks - 1)))
