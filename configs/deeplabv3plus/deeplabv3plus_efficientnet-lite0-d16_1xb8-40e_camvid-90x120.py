# DeepLabV3+ with EfficientNet-Lite0, trained on ImageNet, at output stride 16, on CamVid at a quarter of its size:
# 4.0 M parameters. docs/data.md says where the weights come from.
# The import makes 'mmseg::' resolve on both lines of mm packages, whatever program reads this.
_base_ = __import__('csg_seg.mm') and [
    'mmseg::_base_/default_runtime.py',
    '../_base_/datasets/camvid_90x120.py',
    '../_base_/schedules/sgd_40e.py',
]
custom_imports = dict(imports=['csg_seg.mm'])
norm_cfg = dict(type='BN', requires_grad=True)
model = dict(
    type='EncoderDecoder',
    data_preprocessor=dict(
        type='SegDataPreProcessor',
        mean=[127.0] * 3,
        std=[128.0] * 3,
        bgr_to_rgb=True,
        pad_val=0,
        seg_pad_val=255,
        size=(90, 120),
    ),
    backbone=dict(
        type='TIMMBackbone',
        model_name='tf_efficientnet_lite0',
        out_indices=(1, 2, 3, 4),
        output_stride=16,
        pretrained=False,
        init_cfg=dict(type='Pretrained', checkpoint='data/efficientnet-lite0.pth'),
    ),
    decode_head=dict(
        type='DepthwiseSeparableASPPHead',
        in_channels=320,
        in_index=3,
        channels=128,
        dilations=(1, 2, 4, 6),
        c1_in_channels=24,
        c1_channels=24,
        dropout_ratio=0.1,
        num_classes=11,
        norm_cfg=norm_cfg,
        align_corners=False,
        loss_decode=dict(type='CrossEntropyLoss', use_sigmoid=False, loss_weight=1.0),
    ),
    train_cfg=dict(),
    test_cfg=dict(mode='whole'),
)
log_processor = dict(by_epoch=True)
randomness = dict(seed=0)
