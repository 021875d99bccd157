# DeepLabV3+ with EfficientNet-Lite0, on CamVid at 90 x 120: 982,502 parameters stored for 3,954,499 dense, 4.02x.
# Generators and codes are fitted to the backbone's weights.
_base_ = './deeplabv3plus_efficientnet-lite0-d16_1xb8-40e_camvid-90x120.py'
model = dict(type='CSGModel', base_type={{_base_.model.type}}, csg=dict(ratio=4))
default_hooks = dict(csg=dict(type='CSGHook', save_compact=True))
