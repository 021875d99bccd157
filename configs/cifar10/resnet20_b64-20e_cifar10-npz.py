# ResNet-20 on the CIFAR-10 subset: 269,722 parameters, the dense twin.
_base_ = [
    '../_base_/models/cifar_resnet20.py',
    '../_base_/datasets/cifar10_npz.py',
    '../_base_/schedules/cifar10_20e.py',
]
custom_imports = dict(imports=['csg_seg.mm'])
