# DeepLabV3, ResNet-18 at output stride 16, on Kvasir-SEG at 192 x 192 pixels, all 3x3 convs generated: 1.4 M parameters stored for 14.0 M dense, 10.21x.
_base_ = './deeplabv3_r18-d16_1xb8-40e_kvasir-192x192.py'
model = dict(type='CSGModel', base_type={{_base_.model.type}}, csg=dict(slice_shape=(16, 16, 3, 3), code_dim=128))
default_hooks = dict(csg=dict(type='CSGHook', save_compact=True))
