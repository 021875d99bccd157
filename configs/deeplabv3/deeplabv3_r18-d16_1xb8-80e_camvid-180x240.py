# DeepLabV3, ResNet-18 at output stride 16, on CamVid at half size, from scratch: 14.0 M parameters.
# The import makes 'mmseg::' resolve on both lines of mm packages, whatever program reads this.
_base_ = __import__('csg_seg.mm') and [
    'mmseg::_base_/models/deeplabv3_r50-d8.py',
    'mmseg::_base_/default_runtime.py',
    '../_base_/datasets/camvid_180x240.py',
    '../_base_/schedules/sgd_80e.py',
]
custom_imports = dict(imports=['csg_seg.mm'])
norm_cfg = dict(type='BN', requires_grad=True)
model = dict(
    pretrained=None,
    data_preprocessor=dict(size=(180, 240)),
    backbone=dict(depth=18, norm_cfg=norm_cfg, strides=(1, 2, 2, 1), dilations=(1, 1, 1, 2)),
    decode_head=dict(in_channels=512, channels=128, dilations=(1, 6, 12, 18), num_classes=11, norm_cfg=norm_cfg),
    auxiliary_head=dict(in_channels=256, channels=64, num_classes=11, norm_cfg=norm_cfg),
)
log_processor = dict(by_epoch=True)
randomness = dict(seed=0)
