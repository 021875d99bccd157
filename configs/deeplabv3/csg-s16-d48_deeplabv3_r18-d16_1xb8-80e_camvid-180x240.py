# DeepLabV3, ResNet-18 at output stride 16, on CamVid at half size, all 3x3 convs generated: 0.7 M parameters stored for 14.0 M dense, 19.62x.
_base_ = './deeplabv3_r18-d16_1xb8-80e_camvid-180x240.py'
model = dict(type='CSGModel', base_type={{_base_.model.type}}, csg=dict(slice_shape=(16, 16, 3, 3), code_dim=48))
default_hooks = dict(csg=dict(type='CSGHook', save_compact=True))
