# DeepLabV3, ResNet-18, on CamVid at half size, the short schedule of a network that starts from trained weights.
_base_ = './deeplabv3_r18-d8_1xb4-1k_camvid-144x192.py'
max_iters = 250
optim_wrapper = dict(optimizer=dict(lr=5e-4))
param_scheduler = [
    dict(type='LinearLR', start_factor=0.1, begin=0, end=25, by_epoch=False),
    dict(type='PolyLR', power=0.9, eta_min=1e-5, begin=25, end=max_iters, by_epoch=False),
]
train_cfg = dict(max_iters=max_iters, val_interval=max_iters + 1)
