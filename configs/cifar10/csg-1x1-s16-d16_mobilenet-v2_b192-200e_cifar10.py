# MobileNetV2 on CIFAR-10: 1,595,322 parameters stored for 2,296,922 dense, 1.44x.
_base_ = './mobilenet-v2_b192-200e_cifar10.py'
custom_imports = dict(imports=['csg_seg.mm'])
model = dict(
    type='CSGModel',
    base_type={{_base_.model.type}},
    csg=dict(slice_shape=(16, 16, 1, 1), code_dim=16, include=['backbone.layers.*.conv1']),
)
default_hooks = dict(csg=dict(type='CSGHook', save_compact=True))
