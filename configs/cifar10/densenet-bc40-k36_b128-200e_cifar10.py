# DenseNet-BC, 40 layers, growth 36, on CIFAR-10: 1,542,682 parameters, the dense twin.
_base_ = [
    '../_base_/models/cifar_densenet-bc40-k36.py',
    '../_base_/datasets/cifar10.py',
    '../_base_/schedules/cifar10_200e.py',
]
custom_imports = dict(imports=['csg_seg.mm'])
train_dataloader = dict(batch_size=128)
