# MobileNetV2 on CIFAR-10, random binary generator: 1,591,226 parameters stored for 2,296,922 dense, 1.44x.
_base_ = './csg-1x1-s16-d16_mobilenet-v2_b192-200e_cifar10.py'
model = dict(csg=dict(generator='binary'))
