# UNet of a quarter of the usual width on Kvasir-SEG at 96 x 96 pixels, from scratch: 1.8 M parameters.
# The import makes 'mmseg::' resolve on both lines of mm packages, whatever program reads this.
_base_ = __import__('csg_seg.mm') and [
    'mmseg::_base_/default_runtime.py',
    '../_base_/models/unet-s5-d16-w16.py',
    '../_base_/datasets/kvasir_96.py',
    '../_base_/schedules/sgd_40e.py',
]
custom_imports = dict(imports=['csg_seg.mm'])
model = dict(
    data_preprocessor=dict(size=(96, 96)),
    decode_head=dict(num_classes=2),
    auxiliary_head=dict(num_classes=2),
)
# As for DeepLabV3-R18 at this size.
optim_wrapper = dict(optimizer=dict(lr=0.2))
log_processor = dict(by_epoch=True)
randomness = dict(seed=0)
