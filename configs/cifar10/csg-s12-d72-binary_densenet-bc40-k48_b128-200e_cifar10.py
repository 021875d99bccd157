# DenseNet-BC, 40 layers, growth 48, on CIFAR-10, random binary generator: 1,323,082 parameters stored for 2,733,130 dense, 2.07x.
_base_ = './csg-s12-d72_densenet-bc40-k48_b128-200e_cifar10.py'
model = dict(csg=dict(generator='binary'))
