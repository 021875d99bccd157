"""The drawn data set: what is written, when nothing is, and that constant guesses score little."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from csg_seg.data.drawn import IGNORE, OBJECTS, draw_dataset
from csg_seg.errors import CSGError

SMALL = {'train': 24, 'val': 21, 'size': 48}


@pytest.fixture(scope='module')
def home(tmp_path_factory) -> Path:
    return draw_dataset(tmp_path_factory.mktemp('drawn'), **SMALL)


def contents(folder: Path) -> dict[str, bytes]:
    files = (path for path in sorted(folder.rglob('*')) if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def masks(home: Path, split: str) -> list[np.ndarray]:
    names = (home / f'ImageSets/Segmentation/{split}.txt').read_text().split()
    assert len(names) == SMALL[split]
    return [np.asarray(Image.open(home / f'SegmentationClass/{name}.png')) for name in names]


def test_same_arguments_give_the_same_bytes(home, tmp_path):
    assert contents(draw_dataset(tmp_path, **SMALL)) == contents(home)


def test_another_seed_gives_other_masks(home, tmp_path):
    other = draw_dataset(tmp_path, **SMALL, seed=1)
    pairs = zip(masks(home, 'train'), masks(other, 'train'), strict=True)
    assert not any(np.array_equal(a, b) for a, b in pairs)


def test_more_images_leave_the_first_ones_as_they_are(home, tmp_path):
    fewer = draw_dataset(tmp_path, train=3, val=2, size=SMALL['size'])
    for split, count in (('train', 3), ('val', 2)):
        for index in range(count):
            name = f'JPEGImages/{split}_{index:05d}.jpg'
            assert (fewer / name).read_bytes() == (home / name).read_bytes()


def test_no_image_is_in_both_splits(home):
    train, val = ({mask.tobytes() for mask in masks(home, split)} for split in ('train', 'val'))
    assert not train & val


@pytest.mark.parametrize('split', ['train', 'val'])
def test_a_split_shows_all_21_classes_and_the_ignored_border(home, split):
    shown = np.unique(np.stack(masks(home, split)))
    assert shown.tolist() == [*range(21), IGNORE]


def test_a_border_separates_any_two_labels(home):
    for mask in masks(home, 'val'):
        for a, b in ((mask[1:], mask[:-1]), (mask[:, 1:], mask[:, :-1])):
            differ = (a != b) & (a != IGNORE) & (b != IGNORE)
            assert not differ.any()


def test_mmseg_reads_the_layout(home):
    datasets = pytest.importorskip('mmseg.datasets')
    dataset = datasets.PascalVOCDataset(
        data_root=str(home),
        data_prefix={'img_path': 'JPEGImages', 'seg_map_path': 'SegmentationClass'},
        ann_file='ImageSets/Segmentation/val.txt',
    )
    assert len(dataset) == SMALL['val']
    assert dataset.metainfo['classes'][1:] == tuple(OBJECTS)
    sample = dataset[0]
    with Image.open(sample['img_path']) as image, Image.open(sample['seg_map_path']) as mask:
        assert image.size == mask.size == (SMALL['size'],) * 2
        assert (image.mode, mask.mode) == ('RGB', 'P')
        voc = np.reshape(mask.getpalette(), (-1, 3))
    assert voc[:21].tolist() == [list(colour) for colour in dataset.metainfo['palette']]
    assert voc[IGNORE].tolist() == [224, 224, 192]


def test_no_constant_guess_reaches_10_miou(home):
    """A constant guess has an IoU above 0 in one class alone: its share of the pixels."""
    pixels = np.concatenate([mask.ravel() for mask in masks(home, 'val')])
    counts = np.bincount(pixels[pixels != IGNORE], minlength=21)
    assert (counts > 0).all()
    best_miou = counts.max() / counts.sum() / len(counts)
    assert best_miou < 0.1


def test_drawing_again_leaves_the_files_untouched(home):
    stamps = {path: path.stat().st_mtime_ns for path in home.rglob('*')}
    assert draw_dataset(home.parent, **SMALL) == home
    assert {path: path.stat().st_mtime_ns for path in home.rglob('*')} == stamps


def test_other_arguments_are_refused(home):
    before = contents(home.parent)
    with pytest.raises(CSGError, match='draw into another folder'):
        draw_dataset(home.parent, **SMALL, seed=1)
    assert contents(home.parent) == before


@pytest.mark.parametrize('record', [None, '', '[]'])
def test_a_foreign_folder_is_refused(tmp_path, record):
    foreign = tmp_path / 'VOC2012'
    foreign.mkdir()
    (foreign / 'mine.txt').write_text('kept')
    if record is not None:
        (foreign / 'drawn.json').write_text(record)
    before = contents(tmp_path)
    with pytest.raises(CSGError, match=f'{foreign}.*draw into another folder'):
        draw_dataset(tmp_path, **SMALL)
    assert contents(tmp_path) == before


def test_a_data_set_that_lacks_files_is_refused(tmp_path):
    home = draw_dataset(tmp_path, train=2, val=1, size=32)
    (home / 'JPEGImages/val_00000.jpg').unlink()
    with pytest.raises(CSGError, match='delete it and draw again'):
        draw_dataset(tmp_path, train=2, val=1, size=32)


def test_an_interrupted_run_leaves_nothing(tmp_path):
    def stop(jobs):
        yield jobs[0]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        draw_dataset(tmp_path, **SMALL, progress=stop)
    assert list(tmp_path.iterdir()) == []


def test_a_file_in_the_way_is_refused(tmp_path):
    (tmp_path / 'drawn').write_text('kept')
    with pytest.raises(CSGError, match='drawn cannot be created .* draw into another folder'):
        draw_dataset(tmp_path / 'drawn', **SMALL)
    assert (tmp_path / 'drawn').read_text() == 'kept'


@pytest.mark.parametrize('wrong', [{'train': 0}, {'val': 0}, {'size': 31}, {'seed': -1}])
def test_arguments_out_of_range_are_refused(tmp_path, wrong):
    with pytest.raises(CSGError, match='train and val start at 1, size at 32 and seed at 0'):
        draw_dataset(tmp_path, **{**SMALL, **wrong})
    assert list(tmp_path.iterdir()) == []


def test_the_record_names_the_arguments(home):
    record = json.loads((home / 'drawn.json').read_text())
    assert record == {'version': record['version'], **SMALL, 'seed': 0}
