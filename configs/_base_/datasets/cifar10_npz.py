# The CIFAR-10 subset in one file, data/cifar10-subset.npz: 5,085 images to train on, 1,017 to test.
_base_ = './cifar10.py'
dataset_type = 'NPZDataset'
data_root = 'data'
classes = ('airplane', 'automobile', 'bird', 'cat', 'deer', 'dog', 'frog', 'horse', 'ship', 'truck')
common = dict(
    _delete_=True,
    type=dataset_type,
    data_root=data_root,
    ann_file='cifar10-subset.npz',
    metainfo=dict(classes=classes),
)
loader = dict(num_workers=0, persistent_workers=False)
train_dataloader = dict(batch_size=64, **loader, dataset=dict(split='train', pipeline=_base_.train_pipeline, **common))
val_dataloader = dict(**loader, dataset=dict(split='test', pipeline=_base_.test_pipeline, **common))
test_dataloader = val_dataloader
