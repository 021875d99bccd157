# ResNet-110 on CIFAR-10, random binary generator: 134,674 parameters stored for 1,727,962 dense, 12.83x.
_base_ = './csg-s12-d72_resnet110_b192-200e_cifar10.py'
model = dict(csg=dict(generator='binary'))
