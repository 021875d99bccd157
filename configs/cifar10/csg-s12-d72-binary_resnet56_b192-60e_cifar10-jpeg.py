# ResNet-56 on CIFAR-10 as JPEG files, random binary generator: 67,138 parameters stored for 853,018 dense, 12.71x.
_base_ = './csg-s12-d72_resnet56_b192-60e_cifar10-jpeg.py'
model = dict(csg=dict(generator='binary'))
