# ResNet-20 on CIFAR-10: 269,722 parameters, the dense twin.
_base_ = [
    '../_base_/models/cifar_resnet20.py',
    '../_base_/datasets/cifar10.py',
    '../_base_/schedules/cifar10_200e.py',
]
custom_imports = dict(imports=['csg_seg.mm'])
