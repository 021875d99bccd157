# DenseNet-BC, 40 layers, growth 48, on CIFAR-10: 1,416,394 parameters stored for 2,733,130 dense, 1.93x.
_base_ = './densenet-bc40-k48_b128-200e_cifar10.py'
custom_imports = dict(imports=['csg_seg.mm'])
model = dict(type='CSGModel', base_type={{_base_.model.type}}, csg=dict(slice_shape=(12, 12, 3, 3), code_dim=72))
default_hooks = dict(csg=dict(type='CSGHook', save_compact=True))
