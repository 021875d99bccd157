# ResNet-110 on CIFAR-10: 1,727,962 parameters, the dense twin.
_base_ = './resnet20_b192-200e_cifar10.py'
model = dict(backbone=dict(depth=110))
