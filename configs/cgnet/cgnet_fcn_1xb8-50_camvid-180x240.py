# CGNet on CamVid, crops of half the size, the short schedule of a network that starts from trained weights.
_base_ = './cgnet_fcn_1xb8-20k_camvid-360x480.py'
crop_size = (180, 240)
train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations'),
    dict(type='RandomCrop', crop_size=crop_size, cat_max_ratio=0.75),
    dict(type='RandomFlip', prob=0.5),
    dict(type='PackSegInputs'),
]
loader = dict(num_workers=0, persistent_workers=False)
train_dataloader = dict(**loader, dataset=dict(pipeline=train_pipeline))
val_dataloader = dict(**loader)
test_dataloader = dict(**loader)
model = dict(data_preprocessor=dict(size=crop_size))
max_iters = 50
optim_wrapper = dict(optimizer=dict(lr=5e-4))
param_scheduler = [
    dict(type='LinearLR', start_factor=0.1, begin=0, end=5, by_epoch=False),
    dict(type='PolyLR', power=0.9, eta_min=1e-5, begin=5, end=max_iters, by_epoch=False),
]
train_cfg = dict(max_iters=max_iters, val_interval=max_iters + 1)
default_hooks = dict(checkpoint=dict(interval=max_iters), logger=dict(interval=10))
randomness = dict(seed=0)
