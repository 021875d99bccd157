# ResNet-56 on CIFAR-10 as JPEG files: 160,450 parameters stored for 853,018 dense, 5.32x.
_base_ = './resnet56_b192-60e_cifar10-jpeg.py'
custom_imports = dict(imports=['csg_seg.mm'])
model = dict(type='CSGModel', base_type={{_base_.model.type}}, csg=dict(slice_shape=(12, 12, 3, 3), code_dim=72))
default_hooks = dict(csg=dict(type='CSGHook', save_compact=True))
