# UNet of a quarter of the usual width on CamVid at a quarter of its size, from scratch: 1.8 M parameters.
# The import makes 'mmseg::' resolve on both lines of mm packages, whatever program reads this.
_base_ = __import__('csg_seg.mm') and [
    'mmseg::_base_/default_runtime.py',
    '../_base_/models/unet-s5-d16-w16.py',
    '../_base_/datasets/camvid_90x120.py',
    '../_base_/schedules/sgd_80e.py',
]
custom_imports = dict(imports=['csg_seg.mm'])
crop_size = (96, 128)
train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations'),
    dict(type='RandomResize', scale=(120, 90), ratio_range=(0.75, 1.75), keep_ratio=True),
    dict(type='RandomCrop', crop_size=crop_size),
    dict(type='RandomFlip', prob=0.5),
    dict(type='PhotoMetricDistortion'),
    dict(type='PackSegInputs'),
]
train_dataloader = dict(dataset=dict(pipeline=train_pipeline))
model = dict(
    data_preprocessor=dict(size=crop_size),
    decode_head=dict(num_classes=11),
    auxiliary_head=dict(num_classes=11),
)
# As for DeepLabV3-R18 at this size.
optim_wrapper = dict(optimizer=dict(lr=0.2))
log_processor = dict(by_epoch=True)
randomness = dict(seed=0)
