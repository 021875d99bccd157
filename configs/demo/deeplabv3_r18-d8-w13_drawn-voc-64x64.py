# The demo's DeepLabV3 with 13 channels instead of 32: 0.57 M parameters, 1.4 % more than CSG.
_base_ = './deeplabv3_r18-d8-w32_drawn-voc-64x64.py'
model = dict(
    backbone=dict(stem_channels=13, base_channels=13),
    decode_head=dict(in_channels=104, channels=24),
    auxiliary_head=dict(in_channels=52, channels=24),
)
# As many steps as the dense network and the CSG network that continues from it, together.
max_iters = 900
param_scheduler = [
    dict(type='LinearLR', start_factor=0.1, begin=0, end=30, by_epoch=False),
    dict(type='PolyLR', power=0.9, eta_min=1e-5, begin=30, end=max_iters, by_epoch=False),
]
train_cfg = dict(max_iters=max_iters, val_interval=max_iters + 1)
default_hooks = dict(checkpoint=dict(interval=max_iters))
