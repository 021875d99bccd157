# ResNet-20 on CIFAR-10: 312,218 parameters stored for 269,722 dense, 0.86x.
_base_ = './resnet20_b192-200e_cifar10.py'
custom_imports = dict(imports=['csg_seg.mm'])
model = dict(type='CSGModel', base_type={{_base_.model.type}}, csg=dict(slice_shape=(16, 16, 3, 3), code_dim=128))
default_hooks = dict(csg=dict(type='CSGHook', save_compact=True))
