# CIFAR-10 as JPEG files in one archive, data/cifar10-jpeg.tar.xz, decoded into memory (184 MB) in ten seconds.
# What the compression destroyed costs accuracy: compare with results on the same files only.
_base_ = './cifar10.py'
dataset_type = 'TarDataset'
data_root = 'data'
common = dict(_delete_=True, type=dataset_type, data_root=data_root, ann_file='cifar10-jpeg.tar.xz')
loader = dict(num_workers=0, persistent_workers=False)
train_dataloader = dict(**loader, dataset=dict(split='train', pipeline=_base_.train_pipeline, **common))
val_dataloader = dict(**loader, dataset=dict(split='test', pipeline=_base_.test_pipeline, **common))
test_dataloader = val_dataloader
