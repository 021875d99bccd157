# DeepLabV3, ResNet-18 at output stride 16, on CamVid at half size, from scratch: 14.0 M parameters.
# The import makes 'mmseg::' resolve on both lines of mm packages, whatever program reads this.
_base_ = __import__('csg_seg.mm') and [
    'mmseg::_base_/default_runtime.py',
    '../_base_/models/deeplabv3_r18-d16.py',
    '../_base_/datasets/camvid_180x240.py',
    '../_base_/schedules/sgd_80e.py',
]
custom_imports = dict(imports=['csg_seg.mm'])
model = dict(
    data_preprocessor=dict(size=(180, 240)),
    decode_head=dict(num_classes=11),
    auxiliary_head=dict(num_classes=11),
)
log_processor = dict(by_epoch=True)
randomness = dict(seed=0)
