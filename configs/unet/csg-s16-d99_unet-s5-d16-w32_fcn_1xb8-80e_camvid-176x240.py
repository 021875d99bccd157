# UNet of half the usual width on CamVid at half size, all 3x3 convs generated: 0.7 M parameters stored for 7.3 M dense, 10.16x.
_base_ = './unet-s5-d16-w32_fcn_1xb8-80e_camvid-176x240.py'
model = dict(type='CSGModel', base_type={{_base_.model.type}}, csg=dict(slice_shape=(16, 16, 3, 3), code_dim=99))
default_hooks = dict(csg=dict(type='CSGHook', save_compact=True))
