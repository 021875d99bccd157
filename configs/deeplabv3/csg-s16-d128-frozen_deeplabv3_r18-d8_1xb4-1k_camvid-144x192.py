# DeepLabV3, ResNet-18, on CamVid at half size, with a generator trained elsewhere that stays as it is: 1.4 M parameters stored for 14.0 M dense, 10.20x.
_base_ = './csg-s16-d128_deeplabv3_r18-d8_1xb4-1k_camvid-144x192.py'
model = dict(
    csg=dict(freeze_generator=True),
    # Another architecture's, trained on other data.
    generators_from='work_dirs/csg-s16-d128_deeplabv3_r50-d8_4xb4-20k_voc12-512x512/iter_20000.pth',
)
