# DeepLabV3, ResNet-18 of half the width at output stride 16, on CamVid at 90 x 120: 566,582 parameters stored for 3,499,814 dense, 6.18x.
_base_ = './deeplabv3_r18-d16-w32_1xb8-80e_camvid-90x120.py'
model = dict(type='CSGModel', base_type={{_base_.model.type}}, csg=dict(ratio=6.1646))
default_hooks = dict(csg=dict(type='CSGHook', save_compact=True))
