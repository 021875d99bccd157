# ResNet-20 on CIFAR-10 as JPEG files in one archive: 269,722 parameters, the dense twin.
_base_ = [
    '../_base_/models/cifar_resnet20.py',
    '../_base_/datasets/cifar10_jpeg_tar.py',
    '../_base_/schedules/cifar10_20e.py',
]
custom_imports = dict(imports=['csg_seg.mm'])
auto_scale_lr = dict(base_batch_size=192)
