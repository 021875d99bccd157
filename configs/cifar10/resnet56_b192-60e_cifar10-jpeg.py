# ResNet-56 on CIFAR-10 as JPEG files: 853,018 parameters, the dense twin.
_base_ = [
    '../_base_/models/cifar_resnet20.py',
    '../_base_/datasets/cifar10_jpeg.py',
    '../_base_/schedules/cifar10_60e.py',
]
custom_imports = dict(imports=['csg_seg.mm'])
model = dict(backbone=dict(depth=56))
