# ResNet-20 on CIFAR-10: 115,426 parameters stored for 269,722 dense, 2.34x.
_base_ = './resnet20_b192-200e_cifar10.py'
custom_imports = dict(imports=['csg_seg.mm'])
model = dict(type='CSGModel', base_type={{_base_.model.type}}, csg=dict(slice_shape=(12, 12, 3, 3), code_dim=72))
default_hooks = dict(csg=dict(type='CSGHook', save_compact=True))
