# CIFAR-10 as JPEG files, data/cifar10-jpeg/{train,test}/CLASS/*.jpg. What the compression destroyed
# costs accuracy: compare with results on the same files only.
_base_ = './cifar10.py'
dataset_type = 'ImageFolderDataset'
data_root = 'data/cifar10-jpeg'
data_preprocessor = dict(to_rgb=True)
train_pipeline = [dict(type='LoadImageFromFile'), *_base_.train_pipeline]
test_pipeline = [dict(type='LoadImageFromFile'), *_base_.test_pipeline]
common = dict(_delete_=True, type=dataset_type, data_root=data_root)
train_dataloader = dict(dataset=dict(data_prefix='train', pipeline=train_pipeline, **common))
val_dataloader = dict(dataset=dict(data_prefix='test', pipeline=test_pipeline, **common))
test_dataloader = val_dataloader
