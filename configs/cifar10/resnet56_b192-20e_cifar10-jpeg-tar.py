# ResNet-56 on CIFAR-10 as JPEG files in one archive: 853,018 parameters, the dense twin.
_base_ = './resnet20_b192-20e_cifar10-jpeg-tar.py'
model = dict(backbone=dict(depth=56))
