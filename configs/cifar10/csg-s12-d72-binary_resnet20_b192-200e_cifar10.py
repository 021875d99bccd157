# ResNet-20 on CIFAR-10, random binary generator: 22,114 parameters stored for 269,722 dense, 12.20x.
_base_ = './csg-s12-d72_resnet20_b192-200e_cifar10.py'
model = dict(csg=dict(generator='binary'))
