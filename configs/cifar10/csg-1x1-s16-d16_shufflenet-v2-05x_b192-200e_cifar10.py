# ShuffleNetV2 0.5x on CIFAR-10: 171,818 parameters stored for 352,042 dense, 2.05x.
_base_ = './shufflenet-v2-05x_b192-200e_cifar10.py'
custom_imports = dict(imports=['csg_seg.mm'])
model = dict(
    type='CSGModel',
    base_type={{_base_.model.type}},
    csg=dict(slice_shape=(16, 16, 1, 1), code_dim=16, include=['backbone.layers.3']),
)
default_hooks = dict(csg=dict(type='CSGHook', save_compact=True))
