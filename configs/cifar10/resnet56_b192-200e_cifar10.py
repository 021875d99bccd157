# ResNet-56 on CIFAR-10: 853,018 parameters, the dense twin.
_base_ = './resnet20_b192-200e_cifar10.py'
model = dict(backbone=dict(depth=56))
