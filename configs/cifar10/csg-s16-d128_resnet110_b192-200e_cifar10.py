# ResNet-110 on CIFAR-10: 399,578 parameters stored for 1,727,962 dense, 4.32x.
_base_ = './resnet110_b192-200e_cifar10.py'
custom_imports = dict(imports=['csg_seg.mm'])
model = dict(type='CSGModel', base_type={{_base_.model.type}}, csg=dict(slice_shape=(16, 16, 3, 3), code_dim=128))
default_hooks = dict(csg=dict(type='CSGHook', save_compact=True))
