"""Masks with labels that are no classes are named, with what to do, wherever they are read."""

import shutil

import mmcv
import numpy as np
import pytest
import torch
from conftest import ROOT, cfg_options
from mmcv.transforms import BaseTransform
from mmengine.registry import DATASETS, TRANSFORMS, init_default_scope
from PIL import Image

from csg_seg.errors import CSGError
from csg_seg.mm.datasets import labels
from csg_seg.mm.model import build_model
from csg_seg.running.configs import read_config
from csg_seg.running.preflight import check_data

DEMO = ROOT / 'configs' / 'demo' / 'csg-6x_deeplabv3_r18-d8-w32_drawn-voc-64x64.py'
RESNET20 = ROOT / 'configs' / 'cifar10' / 'resnet20_b64-20e_cifar10-npz.py'


def paint(root, name, label):
    """Give a few pixels of a mask another label."""
    path = root / 'SegmentationClass' / f'{name}.png'
    image = Image.open(path)
    mask = np.array(image)
    mask[3:9, 4:9] = label
    painted = Image.fromarray(mask)
    if image.getpalette():
        painted.putpalette(image.getpalette())
    painted.save(path)
    return path


def options(root, **more):
    more |= {f'{split}_dataloader.dataset.data_root': str(root) for split in ('train', 'val', 'test')}
    return {'train_cfg.max_iters': 1, 'train_dataloader.batch_size': 16, **more}


@pytest.fixture
def root(drawn, tmp_path):
    return shutil.copytree(drawn, tmp_path / 'VOC2012')


@pytest.fixture
def refused(refused, root, tmp_path):
    """Run a tool on the data, and return the one line it ends with."""
    checkpoint = tmp_path / 'x.pth'

    def call(tool, *args, **more) -> str:
        checkpoints = []
        if tool == 'test.py':
            torch.save({'state_dict': build_model(read_config(DEMO, options(root, **more))).state_dict()}, checkpoint)
            checkpoints = [checkpoint]
        work = ['--work-dir', tmp_path / 'work', *cfg_options(options(root, **more))]
        return refused(tool, DEMO, *checkpoints, *work, *args)

    return call


@pytest.mark.parametrize(('tool', 'split'), [('train.py', 'train'), ('train.py', 'val'), ('test.py', 'test')])
@pytest.mark.parametrize('looked_into', [True, False])
def test_a_label_that_is_no_class_is_named_with_its_file(refused, root, monkeypatch, tool, split, looked_into):
    if not looked_into:  # before the run; then the batch tells
        monkeypatch.setattr(labels, 'MASKS', 1)
    path = paint(root, 'train_00005' if split == 'train' else 'val_00003', 30)
    message = refused(tool, **{'train_cfg.val_interval': 1})
    assert f'{split} data: {path} has label 30, and the network has classes 0 to 20 and ignores 255' in message
    assert 'correct num_classes, let ignore_index be 30, or set reduce_zero_label=True' in message


SIGMOID = {'loss_decode.use_sigmoid': True, 'loss_decode.class_weight': None}
LOSSES = {
    'cross entropy': {},
    'sigmoid': SIGMOID,
    'one score': {'num_classes': 2, 'out_channels': 1, 'threshold': 0.5, **SIGMOID},
}


@pytest.mark.parametrize('loss', LOSSES)
def test_whatever_the_loss_raises(refused, root, monkeypatch, loss):
    monkeypatch.setattr(labels, 'MASKS', 1)
    heads = ('decode_head', 'auxiliary_head')
    settings = {f'model.{head}.{key}': value for head in heads for key, value in LOSSES[loss].items()}
    if loss == 'one score':
        for path in root.glob('SegmentationClass/*.png'):
            Image.fromarray((np.array(Image.open(path)) == 0).astype(np.uint8)).save(path)
        for split in ('train', 'val', 'test'):
            settings |= {f'{split}_dataloader.dataset.type': 'BaseSegDataset'}
            settings |= {f'{split}_dataloader.dataset.metainfo.classes': "('other','background')"}
    path = paint(root, 'train_00007', 77)
    assert f'{path} has label 77, and the network has classes 0 to ' in refused('train.py', **settings)


def test_what_is_ignored_or_left_out_is_no_mistake(root):
    for path in root.glob('SegmentationClass/*.png'):
        mask = np.array(Image.open(path))
        Image.fromarray(np.where(mask == 255, 0, mask)).save(path)
    for name in ('train_00005', 'val_00003'):
        paint(root, name, 30)
    check = [options(root, **{'model.decode_head.ignore_index': 30, 'val_evaluator.ignore_index': 30})]
    check += [options(root, **{'train_dataloader.dataset.pipeline.1': dict(type='ThirtyIsBackground')})]
    with pytest.raises(CSGError, match='train_00005.png has label 30'):
        check_data(read_config(DEMO, options(root)), 'train')
    for each in check:
        check_data(read_config(DEMO, each), 'train')
    with pytest.raises(CSGError, match='val_00003.png has label 30'):
        check_data(read_config(DEMO, check[1]), 'val')
    check_data(read_config(DEMO, check[0]), 'val')


@TRANSFORMS.register_module()
class ThirtyIsBackground(BaseTransform):
    """A transform of a user's own, after which labels are others."""

    def transform(self, results):
        return results


def test_labels_from_one_on_are_told_from_those_that_leave_zero_out(root):
    for path in root.glob('SegmentationClass/*.png'):
        mask = np.array(Image.open(path))
        Image.fromarray(np.where(mask == 255, 0, mask + 1).astype(np.uint8)).save(path)
    paint(root, 'train_00005', 21)
    with pytest.raises(CSGError, match='has label 21, .* reduce_zero_label=True if labels begin at 1'):
        check_data(read_config(DEMO, options(root)), 'train')
    left_out = {f'train_dataloader.dataset.{key}': True for key in ['reduce_zero_label']}
    check_data(read_config(DEMO, options(root, **left_out)), 'train')


def test_a_damaged_mask_is_named(root):
    path = root / 'SegmentationClass' / 'train_00000.png'
    for content in (b'', b'text', path.read_bytes()[:60]):
        path.write_bytes(content)
        with pytest.raises(CSGError, match=f'train data: {path}: not a mask .*; copy it again'):
            check_data(read_config(DEMO, options(root)), 'train')


def test_a_few_masks_of_many_are_read(root, monkeypatch):
    names = [path.stem for path in root.glob('SegmentationClass/train_*.png')]
    listed = root / 'ImageSets' / 'Segmentation' / 'train.txt'
    listed.write_text('\n'.join(names * 500) + '\n')
    cfg = read_config(DEMO, options(root))
    dataset = DATASETS.build({**cfg.train_dataloader.dataset, '_scope_': 'mmseg', 'serialize_data': False})
    init_default_scope('mmseg')
    check, read = labels.check_mask, []

    def counted(cfg, split, mask, path):
        read.append(path)
        check(cfg, split, mask, path)

    monkeypatch.setattr(labels, 'check_mask', counted)
    labels.check_labels(cfg, 'train', dataset, cfg.train_pipeline)
    assert len(dataset) == 500 * len(names) and len(read) == labels.MASKS


def test_a_class_of_an_image_that_the_classifier_lacks_is_named(tmp_path):
    mmcv.imwrite(np.zeros((32, 32, 3), np.uint8), str(tmp_path / 'x.png'))
    (tmp_path / 'list.txt').write_text('x.png 3\nx.png 12\n')
    cfg = read_config(RESNET20)
    cfg.train_dataloader.dataset = dict(
        type='CustomDataset', data_root=str(tmp_path), ann_file='list.txt', data_prefix='', pipeline=[]
    )
    with pytest.raises(CSGError, match=r'x.png has class 12, and model.head.num_classes is 10 \(0 to 9\)'):
        check_data(cfg, 'train')
