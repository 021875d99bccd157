"""Classification data: read as it is, and refused in one line when it is damaged."""

import io
import pickle
import tarfile

import numpy as np
import pytest
import torch
from conftest import ROOT
from mmengine.config import Config
from mmengine.registry import DATASETS, METRICS
from PIL import Image

from csg_seg.errors import CSGError
from csg_seg.mm.metrics import draw_confusion
from csg_seg.running.preflight import check_data

CIFAR10 = ROOT / 'configs' / 'cifar10'
CLASSES = ('cat', 'dog', 'eel')


def arrays(seed=0, train=12, test=6):
    rng = np.random.default_rng(seed)
    made = {}
    for split, size in (('train', train), ('test', test)):
        made[f'x_{split}'] = rng.integers(0, 256, (size, 32, 32, 3), dtype=np.uint8)
        made[f'y_{split}'] = rng.integers(0, 10, size)
    return made


def npz_config(folder, **dataset):
    cfg = Config.fromfile(CIFAR10 / 'csg-s12-d72_resnet20_b64-20e_cifar10-npz.py')
    cfg.train_dataloader.dataset.update(data_root=str(folder), **dataset)
    return cfg


@pytest.fixture
def folder(tmp_path):
    """A folder for each class, with three images each."""
    rng = np.random.default_rng(0)
    for name in CLASSES:
        (tmp_path / 'train' / name).mkdir(parents=True)
        for each in range(3):
            pixels = rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / 'train' / name / f'{each}.jpg')
    return tmp_path


def build(**dataset):
    return DATASETS.build(dict(pipeline=[], **dataset))


@pytest.mark.parametrize('split', ['train', 'test'])
def test_an_npz_gives_its_images_and_labels_in_order(split, tmp_path):
    made = arrays()
    np.savez(tmp_path / 'cifar10-subset.npz', **made)
    dataset = build(type='NPZDataset', data_root=str(tmp_path), ann_file='cifar10-subset.npz', split=split)
    assert len(dataset) == len(made[f'x_{split}'])
    for each, image, label in zip(dataset, made[f'x_{split}'], made[f'y_{split}'], strict=True):
        assert np.array_equal(each['img'], image)
        assert each['gt_label'] == label


def test_the_real_npz_is_cifar10(real_data):
    cfg = npz_config(real_data)
    check_data(cfg, 'train')
    dataset = DATASETS.build(cfg.train_dataloader.dataset)
    assert len(dataset) == 5085
    assert dataset[0]['inputs'].shape == (3, 32, 32)


@pytest.mark.parametrize(
    ('change', 'says'),
    [
        ({'y_train': None}, "no array 'y_train'; found x_train, x_test, y_test"),
        ({'x_train': np.zeros((12, 32, 32, 3), dtype=np.float32)}, 'x_train is float32'),
        ({'x_train': np.zeros((12, 3, 32, 32), dtype=np.uint8)}, r'images must be uint8 \(n, h, w, 3\)'),
        ({'y_train': np.zeros(11, dtype=int)}, r'12 images need integers \(12,\)'),
        ({'y_train': np.zeros(12)}, 'y_train is float64'),
        ({'y_train': np.full(12, 10)}, 'labels from 10 to 10; 10 classes are numbered from 0'),
        ({'y_train': np.full(12, -1)}, 'labels from -1'),
        ({'y_train': np.full(12, None, dtype=object)}, 'pickled objects, which are not read'),
    ],
)
def test_an_npz_that_does_not_hold_what_it_should_is_refused(change, says, tmp_path):
    made = {key: value for key, value in (arrays() | change).items() if value is not None}
    np.savez(tmp_path / 'cifar10-subset.npz', **made)
    with pytest.raises(CSGError, match=says) as caught:
        check_data(npz_config(tmp_path), 'train')
    assert 'cifar10-subset.npz' in str(caught.value)


def damaged(kind):
    """Bytes that are no ``.npz`` file, or a broken one."""
    if kind == 'npy':
        stream = io.BytesIO()
        np.save(stream, np.zeros(3))
        return stream.getvalue()
    if kind == 'corrupt':
        stream = io.BytesIO()
        np.savez_compressed(stream, **arrays())
        whole = stream.getvalue()
        return whole[:2000] + bytes(2000) + whole[4000:]
    return {'empty': b'', 'cut': b'PK\x03\x04 cut short', 'text': b'no archive at all'}[kind]


@pytest.mark.parametrize('kind', ['empty', 'cut', 'text', 'npy', 'corrupt'])
def test_an_npz_that_is_none_is_refused(kind, tmp_path):
    (tmp_path / 'cifar10-subset.npz').write_bytes(damaged(kind))
    with pytest.raises(CSGError, match='damaged, not an .npz file'):
        check_data(npz_config(tmp_path), 'train')


def test_a_missing_npz_is_named(tmp_path):
    with pytest.raises(CSGError, match='cifar10-subset.npz does not exist'):
        check_data(npz_config(tmp_path), 'train')


def test_a_wrong_number_of_classes_is_refused(tmp_path):
    np.savez(tmp_path / 'cifar10-subset.npz', **arrays())
    cfg = npz_config(tmp_path)
    cfg.model.head.num_classes = 7
    with pytest.raises(CSGError, match='10 classes, model.head.num_classes is 7'):
        check_data(cfg, 'train')


def test_a_segmentors_wrong_number_of_classes_is_refused(drawn):
    cfg = Config.fromfile(ROOT / 'configs' / 'deeplabv3' / 'csg-s16-d128_deeplabv3_r18-d8_4xb4-20k_voc12-512x512.py')
    cfg.train_dataloader.dataset.data_root = str(drawn)
    check_data(cfg, 'train')
    cfg.model.decode_head.num_classes = 19
    with pytest.raises(CSGError, match='21 classes, model.decode_head.num_classes is 19'):
        check_data(cfg, 'train')


def test_a_folder_gives_every_image_its_class(folder):
    dataset = build(type='ImageFolderDataset', data_root=str(folder), data_prefix='train')
    assert dataset.metainfo['classes'] == CLASSES
    assert [each['gt_label'] for each in dataset] == [0] * 3 + [1] * 3 + [2] * 3


def cut(path):
    path.write_bytes(path.read_bytes()[:300])


def empty(path):
    path.write_bytes(b'')


def text(path):
    path.write_text('no image')


@pytest.mark.parametrize('damage', [cut, empty, text])
def test_a_broken_image_is_named_or_left_out(damage, folder):
    broken = folder / 'train' / 'dog' / '1.jpg'
    damage(broken)
    settings = dict(type='ImageFolderDataset', data_root=str(folder), data_prefix='train')
    with pytest.raises(CSGError, match=r"1 of 9 images are broken, the first .*dog.1.jpg .*broken='skip'"):
        build(**settings)
    dataset = build(**settings, broken='skip')
    assert len(dataset) == 8
    assert str(broken) not in [each['img_path'] for each in dataset]


def test_only_two_ways_to_treat_a_broken_image(folder):
    with pytest.raises(CSGError, match="'refuse' or 'skip'; got 'ignore'"):
        build(type='ImageFolderDataset', data_root=str(folder), data_prefix='train', broken='ignore')


def test_folders_that_are_not_the_classes_are_refused(folder):
    cfg = Config.fromfile(CIFAR10 / 'resnet56_b192-60e_cifar10-jpeg.py')
    cfg.train_dataloader.dataset.update(data_root=str(folder), metainfo=dict(classes=CLASSES[:2]))
    with pytest.raises(CSGError, match=r'train data: The number of subfolders \(3\)'):
        check_data(cfg, 'train')


def tar_config(folder, name, split='train'):
    cfg = Config.fromfile(CIFAR10 / 'resnet20_b192-20e_cifar10-jpeg-tar.py')
    cfg.train_dataloader.dataset.update(data_root=str(folder), ann_file=name, split=split)
    cfg.model.head.num_classes = len(CLASSES)
    return cfg


def pack(folder, name):
    """Put the folder of classes into an archive beside it, compressed as its name says."""
    mode = name.rpartition('.')[2]
    with tarfile.open(folder / name, 'w' if mode == 'tar' else f'w:{mode}') as archive:
        archive.add(folder / 'train', arcname='train' if mode == 'xz' else './train')
    return dict(type='TarDataset', data_root=str(folder), ann_file=name)


@pytest.mark.parametrize('name', ['pets.tar', 'pets.tar.xz', 'pets.tar.gz'])
def test_an_archive_gives_the_images_of_its_folders(name, folder):
    Image.new('L', (32, 32), 7).save(folder / 'train' / 'eel' / 'grey.png')
    dataset = build(**pack(folder, name))
    unpacked = build(type='ImageFolderDataset', data_root=str(folder), data_prefix='train')
    assert dataset.metainfo['classes'] == CLASSES
    assert len(dataset) == len(unpacked) == 10
    for each, file in zip(dataset, unpacked, strict=True):
        assert np.array_equal(each['img'], np.asarray(Image.open(file['img_path']).convert('RGB')))
        assert each['gt_label'] == file['gt_label']
    check_data(tar_config(folder, name), 'train')


@pytest.mark.parametrize(
    ('split', 'classes', 'says'),
    [
        ('val', None, r'val/ has the classes \(none\); wanted are images in SPLIT/CLASS/'),
        ('train', CLASSES[:2], 'train/ has the classes cat, dog, eel; wanted are cat, dog'),
    ],
)
def test_an_archive_with_other_folders_is_refused(split, classes, says, folder):
    settings = pack(folder, 'pets.tar')
    with pytest.raises(CSGError, match=says):
        build(**settings, split=split, metainfo=dict(classes=classes) if classes else None)


@pytest.mark.parametrize('kind', ['cut', 'text', 'image'])
def test_a_damaged_archive_is_refused(kind, folder):
    if kind == 'image':
        cut(folder / 'train' / 'dog' / '1.jpg')
    pack(folder, 'pets.tar.xz')
    archive = folder / 'pets.tar.xz'
    if kind != 'image':
        archive.write_bytes(archive.read_bytes()[:3000] if kind == 'cut' else b'no archive at all')
    says = 'train/dog/1.jpg is broken' if kind == 'image' else 'damaged, or not a tar archive'
    with pytest.raises(CSGError, match=f'train data: .*pets.tar.xz: {says}.*copy .* again'):
        check_data(tar_config(folder, archive.name), 'train')


class Malice:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), 'w')


def test_a_cifar10_batch_that_is_not_the_official_one_is_refused_unread(tmp_path):
    batches = tmp_path / 'cifar-10-batches-py'
    batches.mkdir()
    for name in [*(f'data_batch_{each}' for each in range(1, 6)), 'test_batch', 'batches.meta']:
        (batches / name).write_bytes(pickle.dumps(Malice(tmp_path / 'harm')))
    cfg = Config.fromfile(CIFAR10 / 'resnet20_b192-200e_cifar10.py')
    cfg.train_dataloader.dataset.data_root = str(tmp_path)
    with pytest.raises(CSGError, match='train data: .*CIFAR10'):
        check_data(cfg, 'train')
    assert not (tmp_path / 'harm').exists()


def evaluate(metric, predicted, true, classes):
    metric.dataset_meta = dict(classes=classes)
    one_hot = torch.nn.functional.one_hot
    samples = [
        {
            'pred_score': one_hot(torch.tensor(p), len(classes)).float(),
            'gt_label': torch.tensor([t]),
        }
        for p, t in zip(predicted, true, strict=True)
    ]
    metric.process({}, samples)
    return metric.evaluate(len(samples))


def test_accuracy_of_each_class_and_a_picture(tmp_path):
    metric = METRICS.build(dict(type='PerClassAccuracy', out=str(tmp_path / 'new' / 'confusion.png')))
    found = evaluate(metric, [0, 0, 1, 1, 1], [0, 0, 1, 0, 1], CLASSES)
    assert found == {'accuracy_of/cat': pytest.approx(200 / 3), 'accuracy_of/dog': 100.0}
    with Image.open(tmp_path / 'new' / 'confusion.png') as picture:
        assert min(picture.size) > 200


def test_of_many_classes_the_worst_are_shown(tmp_path):
    metric = METRICS.build(dict(type='PerClassAccuracy', out=str(tmp_path / 'confusion.png'), most=2))
    found = evaluate(metric, [0, 1, 1, 0, 2], [0, 0, 1, 2, 2], CLASSES)
    assert found == {'accuracy_of/cat': 50.0, 'accuracy_of/eel': 50.0}


def test_classes_of_one_name_are_told_apart(tmp_path):
    metric = METRICS.build(dict(type='PerClassAccuracy', out=str(tmp_path / 'confusion.png')))
    found = evaluate(metric, [0, 0, 2], [0, 1, 2], ('crane', 'crane', 'eel'))
    assert found == {'accuracy_of/crane (0)': 100.0, 'accuracy_of/crane (1)': 0.0, 'accuracy_of/eel': 100.0}


def test_a_confusion_matrix_of_a_thousand_classes_is_drawn_without_names():
    matrix = torch.eye(1000, dtype=torch.int64)
    axis = draw_confusion(matrix, [f'class {each}' for each in range(1000)]).axes[0]
    assert axis.get_title() == '100.00 % correct'
    assert not axis.texts
    few = draw_confusion(torch.tensor([[3, 1], [0, 4]]), ['cat', 'dog']).axes[0]
    assert sorted(text.get_text() for text in few.texts) == ['100', '25', '75']
