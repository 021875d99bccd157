# ResNet-20 on the CIFAR-10 subset, the short schedule of a network that starts from trained weights.
_base_ = [
    '../_base_/models/cifar_resnet20.py',
    '../_base_/datasets/cifar10_npz.py',
    '../_base_/schedules/cifar10_3e.py',
]
custom_imports = dict(imports=['csg_seg.mm'])
