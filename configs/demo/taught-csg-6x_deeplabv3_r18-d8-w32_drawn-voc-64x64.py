# The demo's DeepLabV3 from trained weights: 566,466 parameters stored for 3,538,394 dense, 6.25x.
# The dense network, which `make demo` trains first, is the teacher.
_base_ = ['./csg-s16-d128_deeplabv3_r18-d8-w32_drawn-voc-64x64.py', '../_base_/teachers/deeplabv3_blocks.py']
model = dict(
    csg=dict(_delete_=True, ratio=6.19),
    teacher=dict(checkpoint='work_dirs/demo/dense/iter_600.pth', **_base_.deeplabv3_blocks),
)
# Half of the dense network's steps, at a fifth of its learning rate.
max_iters = 300
optim_wrapper = dict(optimizer=dict(lr=0.014))
param_scheduler = [
    dict(type='LinearLR', start_factor=0.1, begin=0, end=30, by_epoch=False),
    dict(type='PolyLR', power=0.9, eta_min=1e-5, begin=30, end=max_iters, by_epoch=False),
]
train_cfg = dict(max_iters=max_iters, val_interval=max_iters + 1)
default_hooks = dict(checkpoint=dict(interval=max_iters))
