# ResNet-110 on CIFAR-10: 227,986 parameters stored for 1,727,962 dense, 7.58x.
_base_ = './resnet110_b192-200e_cifar10.py'
custom_imports = dict(imports=['csg_seg.mm'])
model = dict(type='CSGModel', base_type={{_base_.model.type}}, csg=dict(slice_shape=(12, 12, 3, 3), code_dim=72))
default_hooks = dict(csg=dict(type='CSGHook', save_compact=True))
