# A short one: warm-up, then half a cosine to zero.
# The import makes 'mmpretrain::' resolve on both lines of mm packages, whatever program reads this.
_base_ = __import__('csg_seg.mm') and ['mmpretrain::_base_/default_runtime.py']
max_epochs = 20
warmup = 2
optim_wrapper = dict(optimizer=dict(type='SGD', lr=0.1, momentum=0.9, nesterov=True, weight_decay=5e-4))
param_scheduler = [
    dict(type='LinearLR', start_factor=0.1, by_epoch=True, begin=0, end=warmup, convert_to_iter_based=True),
    dict(
        type='CosineAnnealingLR',
        T_max=max_epochs - warmup,
        by_epoch=True,
        begin=warmup,
        end=max_epochs,
        convert_to_iter_based=True,
    ),
]
train_cfg = dict(by_epoch=True, max_epochs=max_epochs, val_interval=5)
val_cfg = dict()
test_cfg = dict()
auto_scale_lr = dict(base_batch_size=64)
default_hooks = dict(checkpoint=dict(max_keep_ckpts=2), channels_last=dict(type='ChannelsLastHook'))
