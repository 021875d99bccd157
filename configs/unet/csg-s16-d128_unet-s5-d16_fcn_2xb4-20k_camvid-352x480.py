# UNet on CamVid, all 3x3 convs generated: 2.6 M parameters stored for 29.1 M dense, 11.25x.
_base_ = './unet-s5-d16_fcn_2xb4-20k_camvid-352x480.py'
custom_imports = dict(imports=['csg_seg.mm'])
model = dict(type='CSGModel', base_type={{_base_.model.type}}, csg=dict(slice_shape=(16, 16, 3, 3), code_dim=128))
default_hooks = dict(csg=dict(type='CSGHook', save_compact=True), exact_resume=dict(type='ExactResumeHook'))
