# ResNet-18 on an ImageNet sample, data/imagenet-sample/train/WNID/*.JPEG: 11,689,512 parameters, the dense twin.
# It shows that everything runs; it is tested on what it was trained on.
# The import makes 'mmpretrain::' resolve on both lines of mm packages, whatever program reads this.
_base_ = __import__('csg_seg.mm') and 'mmpretrain::resnet/resnet18_8xb32_in1k.py'
custom_imports = dict(imports=['csg_seg.mm'])
data_root = 'data/imagenet-sample'
common = dict(_delete_=True, type='ImageFolderDataset', data_root=data_root, data_prefix='train')
train_dataloader = dict(batch_size=16, num_workers=2, dataset=dict(pipeline=_base_.train_pipeline, **common))
val_dataloader = dict(num_workers=2, dataset=dict(pipeline=_base_.test_pipeline, **common))
test_dataloader = val_dataloader
test_evaluator = [_base_.val_evaluator, dict(type='PerClassAccuracy')]
train_cfg = dict(max_epochs=2)
default_hooks = dict(logger=dict(interval=10))
