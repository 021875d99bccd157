# DenseNet-BC, 40 layers, growth 48, on CIFAR-10: 2,733,130 parameters, the dense twin.
_base_ = './densenet-bc40-k36_b128-200e_cifar10.py'
model = dict(backbone=dict(growth_rate=48), head=dict(in_channels=528))
