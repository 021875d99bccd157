# The recipe of Omidvar et al., AISTATS 2021, the same for dense and CSG.
# The import makes 'mmpretrain::' resolve on both lines of mm packages, whatever program reads this.
_base_ = __import__('csg_seg.mm') and ['mmpretrain::_base_/default_runtime.py']
optim_wrapper = dict(optimizer=dict(type='SGD', lr=0.05, momentum=0.9, weight_decay=5e-4))
param_scheduler = dict(type='MultiStepLR', by_epoch=True, milestones=[100, 150], gamma=0.1)
train_cfg = dict(by_epoch=True, max_epochs=200, val_interval=1)
val_cfg = dict()
test_cfg = dict()
auto_scale_lr = dict(base_batch_size=192)
default_hooks = dict(checkpoint=dict(max_keep_ckpts=2, save_best='auto'))
