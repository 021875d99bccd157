# DeepLabV3, ResNet-50, trained on COCO with VOC's classes: 44.0 M parameters, the dense twin.
# As torchvision's reference trains deeplabv3_resnet50: SGD, lr 0.02 (auxiliary head x10), poly 0.9, weight decay 1e-4,
# 30 epochs at batch 32; its plain ResNet-50 and 256 channels. mmsegmentation's ASPP ends in one 3x3 conv, torchvision's
# in a 1x1 and a 3x3; its dropout is 0.1 before the classifier, torchvision's 0.5 before that 3x3.
# The import makes 'mmseg::' resolve on both lines of mm packages, whatever program reads this.
_base_ = __import__('csg_seg.mm') and [
    'mmseg::_base_/models/deeplabv3_r50-d8.py',
    '../_base_/datasets/coco_voc.py',
    'mmseg::_base_/default_runtime.py',
    'mmseg::_base_/schedules/schedule_80k.py',
]
custom_imports = dict(imports=['csg_seg.mm'])
model = dict(
    pretrained='torchvision://resnet50',
    data_preprocessor=dict(size=(480, 480)),
    backbone=dict(type='ResNet'),
    decode_head=dict(channels=256, num_classes=21),
    auxiliary_head=dict(num_classes=21, loss_decode=dict(loss_weight=0.5)),
)
optimizer = dict(lr=0.02, weight_decay=1e-4)
optim_wrapper = dict(optimizer=optimizer, paramwise_cfg=dict(custom_keys={'auxiliary_head': dict(lr_mult=10.0)}))
# 30 epochs of about 92,500 images, which the rule for small objects leaves of train2017.
param_scheduler = [dict(type='PolyLR', eta_min=0, power=0.9, begin=0, end=86730, by_epoch=False)]
train_cfg = dict(max_iters=86730, val_interval=8673)
default_hooks = dict(checkpoint=dict(interval=8673))
