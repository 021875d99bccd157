# DeepLabV3, ResNet-50, all 3x3 convs generated, from the dense network's weights: 17,586,826 parameters stored for 68,114,570 dense, 3.87x.
_base_ = ['./csg-s16-d128_deeplabv3_r50-d8_4xb4-20k_voc12aug-512x512.py', '../_base_/teachers/deeplabv3_blocks.py']
model = dict(
    teacher=dict(
        checkpoint='work_dirs/deeplabv3_r50-d8_4xb4-20k_voc12aug-512x512/iter_20000.pth', **_base_.deeplabv3_blocks
    )
)
# A tenth of the dense network's steps, at a fifth of its learning rate.
max_iters = 2000
optim_wrapper = dict(optimizer=dict(lr=0.002))
param_scheduler = [
    dict(type='LinearLR', start_factor=0.1, begin=0, end=100, by_epoch=False),
    dict(type='PolyLR', eta_min=2e-5, power=0.9, begin=100, end=max_iters, by_epoch=False),
]
train_cfg = dict(max_iters=max_iters, val_interval=500)
