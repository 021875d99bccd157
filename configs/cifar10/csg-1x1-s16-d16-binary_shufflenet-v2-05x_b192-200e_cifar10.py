# ShuffleNetV2 0.5x on CIFAR-10, random binary generator: 167,722 parameters stored for 352,042 dense, 2.10x.
_base_ = './csg-1x1-s16-d16_shufflenet-v2-05x_b192-200e_cifar10.py'
model = dict(csg=dict(generator='binary'))
