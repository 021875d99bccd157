# DenseNet-BC, 40 layers, growth 36, on CIFAR-10, random binary generator: 749,530 parameters stored for 1,542,682 dense, 2.06x.
_base_ = './csg-s12-d72_densenet-bc40-k36_b128-200e_cifar10.py'
model = dict(csg=dict(generator='binary'))
