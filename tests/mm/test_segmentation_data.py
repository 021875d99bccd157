"""Segmentation data: images of various sizes are resized for the network and scored at their own size."""

import json

import numpy as np
import pytest
from conftest import ROOT
from mmengine.config import Config
from mmengine.registry import DATASETS, init_default_scope
from PIL import Image

from csg_seg.errors import CSGError
from csg_seg.running.preflight import check_data

SIZES = [(57, 80), (120, 90), (64, 64)]


@pytest.fixture
def kvasir(tmp_path):
    """A config of Kvasir-SEG on one drawn image a split."""
    rng = np.random.default_rng(0)
    cfg = Config.fromfile(ROOT / 'configs' / 'unet' / 'unet-s5-d16-w32_fcn_1xb8-40e_kvasir-192x192.py')
    for split, (height, width) in zip(('train', 'val', 'test'), SIZES, strict=True):
        for kind in ('images', 'labels'):
            (tmp_path / kind / split).mkdir(parents=True)
        pixels = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
        mask = rng.integers(0, 2, (height, width), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / 'images' / split / 'a.jpg')
        Image.fromarray(mask).save(tmp_path / 'labels' / split / 'a.png')
        cfg[f'{split}_dataloader'].dataset.data_root = str(tmp_path)
    init_default_scope('mmseg')
    return cfg


@pytest.mark.parametrize(('split', 'size'), zip(('val', 'test'), SIZES[1:], strict=True))
def test_kvasir_is_resized_and_scored_at_full_size(kvasir, split, size):
    check_data(kvasir, split)
    (sample,) = DATASETS.build(kvasir[f'{split}_dataloader'].dataset)
    assert sample['inputs'].shape == (3, 192, 192)
    assert sample['data_samples'].ori_shape == sample['data_samples'].gt_sem_seg.shape == size


def test_kvasir_is_cropped_to_one_size_to_train(kvasir):
    check_data(kvasir, 'train')
    dataset = DATASETS.build(kvasir.train_dataloader.dataset)
    samples = [dataset[0] for _ in range(8)]
    shapes = {tuple(sample['inputs'].shape[1:]) for sample in samples}
    assert (192, 192) in shapes
    assert all(max(shape) <= 192 for shape in shapes)  # smaller ones are padded
    for sample in samples:
        assert sample['data_samples'].gt_sem_seg.shape == sample['inputs'].shape[1:]


def test_a_mask_with_another_value_is_refused(kvasir):
    path = next((ROOT / kvasir.val_dataloader.dataset.data_root).glob('labels/val/*.png'))
    Image.fromarray(np.full(SIZES[1], 2, dtype=np.uint8)).save(path)
    with pytest.raises(CSGError, match='has label 2, and the network has classes 0 to 1'):
        check_data(kvasir, 'val')


def test_the_documents_name_the_split_of_kvasir(real_data):
    split = json.loads((ROOT / 'docs' / 'kvasir-split.json').read_text())
    for part, names in split.items():
        assert {path.stem for path in (real_data / 'kvasir' / 'images' / part).iterdir()} == set(names)
    assert {part: len(names) for part, names in split.items()} == {'val': 100, 'test': 100}
