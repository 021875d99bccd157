# DeepLabV3, ResNet-18, on Pascal VOC 2012 with SBD: 14.0 M parameters, the dense twin.
# The import makes 'mmseg::' resolve on both lines of mm packages, whatever program reads this.
_base_ = __import__('csg_seg.mm') and [
    'mmseg::_base_/models/deeplabv3_r50-d8.py',
    'mmseg::_base_/datasets/pascal_voc12_aug.py',
    'mmseg::_base_/default_runtime.py',
    'mmseg::_base_/schedules/schedule_40k.py',
]
model = dict(
    pretrained='open-mmlab://resnet18_v1c',
    data_preprocessor=dict(size=(512, 512)),
    backbone=dict(depth=18),
    decode_head=dict(in_channels=512, channels=128, num_classes=21),
    auxiliary_head=dict(in_channels=256, channels=64, num_classes=21),
)
