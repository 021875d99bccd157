# ResNet-20 on the CIFAR-10 subset, from the dense network's weights: 116,458 parameters stored for 269,722 dense, 2.32x.
_base_ = ['./resnet20_b64-3e_cifar10-npz.py', '../_base_/teachers/resnet_blocks.py']
custom_imports = dict(imports=['csg_seg.mm'])
model = dict(
    type='CSGModel',
    base_type={{_base_.model.type}},
    csg=dict(slice_shape=(4, 4, 3, 3), code_dim=57),
    teacher=dict(checkpoint='work_dirs/resnet20_b64-20e_cifar10-npz/epoch_20.pth', **_base_.resnet_blocks),
)
default_hooks = dict(csg=dict(type='CSGHook', save_compact=True), exact_resume=dict(type='ExactResumeHook'))
