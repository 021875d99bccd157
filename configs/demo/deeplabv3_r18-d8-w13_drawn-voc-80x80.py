# The demo's DeepLabV3 with 13 channels instead of 32: 0.58 M parameters, about as many as the CSG network stores.
_base_ = './deeplabv3_r18-d8-w32_drawn-voc-80x80.py'
model = dict(
    backbone=dict(stem_channels=13, base_channels=13),
    decode_head=dict(in_channels=104, channels=26),
    auxiliary_head=dict(in_channels=52, channels=26),
)
