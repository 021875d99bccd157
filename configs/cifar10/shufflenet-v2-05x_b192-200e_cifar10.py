# ShuffleNetV2 0.5x on CIFAR-10: 352,042 parameters, the dense twin.
_base_ = [
    '../_base_/models/cifar_shufflenet-v2-05x.py',
    '../_base_/datasets/cifar10.py',
    '../_base_/schedules/cifar10_200e.py',
]
custom_imports = dict(imports=['csg_seg.mm'])
