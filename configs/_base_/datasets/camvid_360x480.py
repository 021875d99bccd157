# CamVid at full size, for training on a CPU.
_base_ = './camvid.py'
loader = dict(num_workers=0, persistent_workers=False)
train_dataloader = dict(**loader, batch_size=8, sampler=dict(type='DefaultSampler', shuffle=True))
val_dataloader = dict(**loader)
test_dataloader = dict(**loader)
