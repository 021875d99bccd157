# DenseNet-BC, 40 layers, growth 36, on CIFAR-10: 1,059,994 parameters stored for 1,542,682 dense, 1.46x.
_base_ = './densenet-bc40-k36_b128-200e_cifar10.py'
custom_imports = dict(imports=['csg_seg.mm'])
model = dict(type='CSGModel', base_type={{_base_.model.type}}, csg=dict(slice_shape=(16, 16, 3, 3), code_dim=128))
default_hooks = dict(csg=dict(type='CSGHook', save_compact=True))
