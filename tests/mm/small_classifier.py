"""A small CIFAR-10 classifier, dense, generated or taught, and trainings of it on a few images."""

import copy

import numpy as np
import torch
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope
from mmengine.runner import Runner
from mmpretrain.structures import DataSample
from torch import nn

from csg_seg import materialise

CSG = dict(slice_shape=(4, 4, 3, 3), code_dim=6)


def dense_model(base_channels=4) -> dict:
    """Return the model config of a dense network."""
    head = dict(type='LinearClsHead', num_classes=10, in_channels=4 * base_channels)
    return dict(
        type='ImageClassifier',
        data_preprocessor=dict(num_classes=10, mean=[127] * 3, std=[60] * 3),
        backbone=dict(type='CIFARResNet', depth=8, base_channels=base_channels),
        neck=dict(type='GlobalAveragePooling'),
        head=dict(**head, loss=dict(type='CrossEntropyLoss')),
    )


def csg_model(csg, teacher=None) -> dict:
    """Return the model config of the generated network."""
    base = dense_model()
    return {**base, 'type': 'CSGModel', 'base_type': base['type'], 'csg': csg, 'teacher': teacher}


def build(model: dict) -> nn.Module:
    """Build and initialise a network, in training mode."""
    init_default_scope('mmpretrain')
    torch.manual_seed(0)
    network = MODELS.build(copy.deepcopy(model))
    network.init_weights()
    return network.train()


def batch(n=6):
    """Return images and their labels."""
    rng = torch.Generator().manual_seed(0)
    images = torch.randn(n, 3, 16, 16, generator=rng)
    return images, [DataSample().set_gt_label(label % 10) for label in range(n)]


def save_dense_network(path) -> str:
    """Save a dense network that CSG fits exactly, whose running statistics are those of some images."""
    network = materialise(build(csg_model(CSG)))
    with torch.no_grad():
        for _ in range(20):
            network(batch()[0], mode='tensor')
    torch.save({'meta': {}, 'state_dict': network.state_dict()}, path)
    return str(path)


def save_images(path) -> None:
    """Save images whose brightness shows the class."""
    rng = np.random.default_rng(0)
    labels = np.arange(48) % 10
    pixels = (rng.uniform(0, 40, (48, 32, 32, 3)) + 20 * labels[:, None, None, None]).astype(np.uint8)
    np.savez(path, x_train=pixels, y_train=labels, x_test=pixels, y_test=labels)


def build_runner(images, model, work_dir, epochs=2, **more) -> Runner:
    """Build a Runner that trains a model on images saved by :func:`save_images`."""
    work_dir.mkdir(exist_ok=True)
    common = dict(data_root=str(images.parent), ann_file=images.name, split='train', pipeline=[dict(type='PackInputs')])
    loader = dict(
        batch_size=12,
        sampler=dict(type='DefaultSampler', shuffle=True),
        dataset=dict(type='NPZDataset', metainfo=dict(classes=tuple('abcdefghij')), **common),
    )
    settings = dict(
        model=model,
        default_scope='mmpretrain',
        work_dir=str(work_dir),
        train_dataloader=loader,
        train_cfg=dict(by_epoch=True, max_epochs=epochs),
        optim_wrapper=dict(optimizer=dict(type='SGD', lr=0.01, momentum=0.9)),
        default_hooks=dict(csg=dict(type='CSGHook'), checkpoint=dict(type='CheckpointHook', interval=1)),
        custom_hooks=[dict(type='ExactResumeHook')],
        randomness=dict(seed=0),
        experiment_name=f'{work_dir.parent.name}-{work_dir.name}',
    )
    return Runner.from_cfg(Config({**settings, **more}))
