# mmsegmentation's UNet at half its width, to train from scratch on a CPU. Sides must be multiples of 16.
# The import makes 'mmseg::' resolve on both lines of mm packages, whatever program reads this.
_base_ = __import__('csg_seg.mm') and ['mmseg::_base_/models/fcn_unet_s5-d16.py']
norm_cfg = dict(type='BN', requires_grad=True)
model = dict(
    data_preprocessor=dict(test_cfg=dict(size_divisor=16)),
    backbone=dict(base_channels=32, norm_cfg=norm_cfg),
    decode_head=dict(in_channels=32, channels=32, norm_cfg=norm_cfg),
    auxiliary_head=dict(in_channels=64, channels=32, norm_cfg=norm_cfg),
    test_cfg=dict(mode='whole', crop_size=None, stride=None),
)
