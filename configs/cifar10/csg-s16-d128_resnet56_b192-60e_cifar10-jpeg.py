# ResNet-56 on CIFAR-10 as JPEG files: 347,162 parameters stored for 853,018 dense, 2.46x.
_base_ = './resnet56_b192-60e_cifar10-jpeg.py'
custom_imports = dict(imports=['csg_seg.mm'])
model = dict(type='CSGModel', base_type={{_base_.model.type}}, csg=dict(slice_shape=(16, 16, 3, 3), code_dim=128))
default_hooks = dict(csg=dict(type='CSGHook', save_compact=True))
