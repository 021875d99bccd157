# The demo's DeepLabV3 with 13 channels instead of 32: 0.57 M parameters, 1.4 % more than CSG.
_base_ = './deeplabv3_r18-d8-w32_drawn-voc-64x64.py'
model = dict(
    backbone=dict(stem_channels=13, base_channels=13),
    decode_head=dict(in_channels=104, channels=24),
    auxiliary_head=dict(in_channels=52, channels=24),
)
