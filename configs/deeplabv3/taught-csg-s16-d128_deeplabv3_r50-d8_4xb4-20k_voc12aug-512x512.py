# DeepLabV3, ResNet-50, all 3x3 convs generated, from the dense network's weights: 17,586,826 parameters stored for 68,114,570 dense, 3.87x.
_base_ = ['./csg-s16-d128_deeplabv3_r50-d8_4xb4-20k_voc12aug-512x512.py', '../_base_/teachers/deeplabv3_blocks.py']
model = dict(
    teacher=dict(
        checkpoint='work_dirs/deeplabv3_r50-d8_4xb4-20k_voc12aug-512x512/iter_20000.pth', **_base_.deeplabv3_blocks
    )
)
