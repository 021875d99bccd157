# DeepLabV3, ResNet-18 of half the usual width at output stride 16, on Kvasir-SEG at 96 x 96 pixels, from scratch:
# 3.5 M parameters. The dilations of the head are scaled to the smaller maps.
# The import makes 'mmseg::' resolve on both lines of mm packages, whatever program reads this.
_base_ = __import__('csg_seg.mm') and [
    'mmseg::_base_/default_runtime.py',
    '../_base_/models/deeplabv3_r18-d16.py',
    '../_base_/datasets/kvasir_96.py',
    '../_base_/schedules/sgd_40e.py',
]
custom_imports = dict(imports=['csg_seg.mm'])
model = dict(
    data_preprocessor=dict(size=(96, 96)),
    backbone=dict(stem_channels=32, base_channels=32),
    decode_head=dict(in_channels=256, channels=64, dilations=(1, 2, 4, 6), num_classes=2),
    auxiliary_head=dict(in_channels=128, channels=32, num_classes=2),
)
optim_wrapper = dict(optimizer=dict(lr=0.2))
log_processor = dict(by_epoch=True)
randomness = dict(seed=0)
