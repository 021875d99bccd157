# MobileNetV2 on CIFAR-10: 2,296,922 parameters, the dense twin.
_base_ = [
    '../_base_/models/cifar_mobilenet-v2.py',
    '../_base_/datasets/cifar10.py',
    '../_base_/schedules/cifar10_200e.py',
]
custom_imports = dict(imports=['csg_seg.mm'])
