# UNet of a quarter of the usual width.
_base_ = './unet-s5-d16-w32.py'
model = dict(
    backbone=dict(base_channels=16),
    decode_head=dict(in_channels=16, channels=16),
    auxiliary_head=dict(in_channels=32, channels=16),
)
