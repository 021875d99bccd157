# The paper's DeepLab, ResNet-101 at output stride 16 with multi-grid (1, 2, 4), with a decoder: 59,344,309 parameters, the dense twin.
# mmsegmentation's multi_grid holds dilations: unit rates (1, 2, 4) times the last stage's 2.
# Its recipe: SGD, lr 0.007 (heads x10), poly 0.9, weight decay 5e-4, 50 epochs at batch 16, crop 513.
# The import makes 'mmseg::' resolve on both lines of mm packages, whatever program reads this.
_base_ = __import__('csg_seg.mm') and [
    'mmseg::_base_/models/deeplabv3_r50-d8.py',
    'mmseg::_base_/datasets/pascal_voc12_aug.py',
    'mmseg::_base_/default_runtime.py',
    '../_base_/schedules/paper_33k.py',
]
crop_size = (513, 513)
model = dict(
    pretrained='torchvision://resnet101',
    data_preprocessor=dict(size=crop_size),
    backbone=dict(
        type='ResNet',
        depth=101,
        strides=(1, 2, 2, 1),
        dilations=(1, 1, 1, 2),
        multi_grid=(2, 4, 8),
        contract_dilation=False,
    ),
    decode_head=dict(
        type='DeepLabV3PlusHead',
        low_level_in_channels=256,
        channels=256,
        dilations=(1, 6, 12, 18),
        num_classes=21,
    ),
    auxiliary_head=None,
)
