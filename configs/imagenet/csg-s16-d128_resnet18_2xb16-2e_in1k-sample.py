# ResNet-18 on an ImageNet sample: 1.6 M parameters stored for 11.7 M dense, 7.26x.
_base_ = './resnet18_2xb16-2e_in1k-sample.py'
custom_imports = dict(imports=['csg_seg.mm'])
model = dict(type='CSGModel', base_type={{_base_.model.type}}, csg=dict(slice_shape=(16, 16, 3, 3), code_dim=128))
default_hooks = dict(csg=dict(type='CSGHook', save_compact=True))
