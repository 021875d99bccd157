"""Masks of VOC's classes from COCO: what is drawn, what is left out, how a run resumes, what is refused."""

import json
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT
from PIL import Image
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO

from csg_seg.data.coco import CLASSES, Scene, make_masks, paint
from csg_seg.data.drawn import palette
from csg_seg.errors import CSGError

# COCO's category ids in VOC's order from background on: torchvision, references/segmentation/coco_utils.py, get_coco.
CAT_LIST = [0, 5, 2, 16, 9, 44, 6, 3, 17, 62, 21, 67, 18, 19, 4, 1, 64, 20, 63, 7, 72]
AIRPLANE, CAT, DOG, PERSON, GIRAFFE = 5, 17, 18, 1, 25
SIZE = (37, 53)
KEPT = ['crowd', 'parts', 'rle', 'sum', 'twenty', 'twins']


def box(x, y, width, height) -> list[float]:
    return [x, y, x + width, y, x + width, y + height, x, y + height]


def blot(seed) -> np.ndarray:
    """A ragged mask in one part of the image."""
    down, right = np.indices(SIZE)
    rng = np.random.default_rng(seed)
    near = np.hypot(down - rng.integers(10, 25), right - rng.integers(15, 35)) < 12
    return np.asfortranarray(near & (rng.random(SIZE) < 0.8), dtype=np.uint8)


def compressed(mask) -> dict:
    rle = coco_mask.encode(mask)
    return {'size': list(rle['size']), 'counts': rle['counts'].decode()}


def counted(mask) -> dict:
    pixels = mask.ravel(order='F')
    ends = np.flatnonzero(np.diff(pixels, prepend=0, append=2))
    return {'size': list(mask.shape), 'counts': np.diff(ends, prepend=0).tolist()}


def instance(category_id, segmentation, *, area=1001.0, iscrowd=0) -> dict:
    return {'category_id': category_id, 'segmentation': segmentation, 'area': area, 'iscrowd': iscrowd}


# What each image shows; the areas are invented, as only their sum counts.
SHOWN = {
    'parts': [
        instance(AIRPLANE, [[3, 2, 40.5, 9.3, 12, 30], box(44, 20, 30, 30)]),
        instance(GIRAFFE, [box(0, 0, 20, 20)]),
    ],
    'rle': [instance(DOG, counted(blot(0))), instance(PERSON, compressed(blot(1)))],
    'twins': [instance(CAT, [box(5, 5, 20, 20)]), instance(CAT, [box(15, 10, 20, 20)])],
    'crowd': [
        instance(CAT, [box(5, 5, 20, 20)]),
        instance(PERSON, counted(blot(2)), iscrowd=1),
        instance(GIRAFFE, compressed(blot(3)), iscrowd=1),
    ],
    'twenty': [instance(id, [box(2 * k, k, 2, 2)], area=60) for k, id in enumerate(CAT_LIST[1:])],
    'sum': [instance(DOG, [box(1, 1, 5, 5)], area=500), instance(CAT, [box(9, 9, 5, 5)], area=501)],
    'small': [instance(DOG, [box(1, 1, 5, 5)], area=1000), instance(GIRAFFE, [box(9, 9, 9, 9)])],
    'foreign': [instance(GIRAFFE, [box(0, 0, 30, 30)])],
    'empty': [],
}


def coco_of(shown) -> dict:
    categories = [dict(id=id, name=name) for id, name in zip(CAT_LIST[1:], CLASSES, strict=True)]
    images, annotations = [], []
    for image_id, (name, instances) in enumerate(shown.items(), start=7):
        images.append(dict(id=image_id, file_name=f'{name}.jpg', height=SIZE[0], width=SIZE[1]))
        annotations += [dict(each, id=len(annotations) + k, image_id=image_id) for k, each in enumerate(instances, 1)]
    return dict(images=images, annotations=annotations, categories=[*categories, dict(id=GIRAFFE, name='giraffe')])


def write_coco(folder, coco) -> tuple[Path, Path]:
    """Write annotations and noise for images; return both paths."""
    (folder / 'images').mkdir(parents=True)
    for index, image in enumerate(coco['images']):
        pixels = np.random.default_rng(index).integers(256, size=(*SIZE, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / 'images' / image['file_name'])
    (folder / 'instances.json').write_text(json.dumps(coco))
    return folder / 'instances.json', folder / 'images'


@pytest.fixture(scope='module')
def coco(tmp_path_factory) -> tuple[Path, Path]:
    return write_coco(tmp_path_factory.mktemp('coco'), coco_of(SHOWN))


@pytest.fixture(scope='module')
def made(coco, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp('made') / 'deep' / 'out'
    assert make_masks(*coco, out) == {'images': len(SHOWN), 'kept': len(KEPT), 'made': len(KEPT)}
    return out


def mask_of(out, name) -> np.ndarray:
    return np.asarray(Image.open(out / 'masks' / f'{name}.png'))


def contents(folder) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob('*') if path.is_file()}


def stamps(folder) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in (folder / 'masks').iterdir()}


@pytest.mark.parametrize('nothing', [[], [1.0, 2.0], [1.0, 2.0, 7.0, 8.0]])
def test_fewer_than_three_points_draw_nothing(nothing):
    square = [1.0, 1.0, 6.0, 1.0, 6.0, 6.0, 1.0, 6.0]
    assert np.array_equal(
        paint(Scene('x', (9, 9), [(3, [square, nothing]), (4, [nothing]), (5, [])])),
        paint(Scene('x', (9, 9), [(3, [square])])),
    )


@pytest.mark.parametrize('name', KEPT)
def test_masks_are_torchvisions_on_pycocotools_own(coco, made, name):
    """ConvertCocoPolysToMask of torchvision's coco_utils.py, with COCO.annToMask; then crowds are ignored."""
    api = COCO(str(coco[0]))
    (image_id,) = [key for key, image in api.imgs.items() if image['file_name'] == f'{name}.jpg']
    instances = [each for each in api.imgToAnns[image_id] if each['category_id'] in CAT_LIST]
    masks = np.stack([api.annToMask(each) for each in instances])
    labels = np.array([CAT_LIST.index(each['category_id']) for each in instances])
    expected = (masks * labels[:, None, None]).max(axis=0)
    expected[masks.sum(axis=0) > 1] = 255
    for mask, each in zip(masks, instances, strict=True):
        expected[(mask == 1) & (each['iscrowd'] == 1)] = 255
    assert np.array_equal(mask_of(made, name), expected)


@pytest.mark.parametrize(
    ('name', 'labels'),
    [
        ('parts', [0, 1]),
        ('rle', [0, 12, 15, 255]),
        ('twins', [0, 8, 255]),
        ('crowd', [0, 8, 255]),
        ('twenty', [*range(21)]),
        ('sum', [0, 8, 12]),
    ],
)
def test_labels_are_vocs(made, name, labels):
    assert np.unique(mask_of(made, name)).tolist() == labels


def test_small_images_and_those_without_vocs_classes_are_left_out(coco, made, tmp_path):
    assert (made / 'list.txt').read_text().split() == KEPT
    assert sorted(path.name for path in made.iterdir()) == ['list.txt', 'made_from.json', 'masks']
    assert sorted(path.stem for path in (made / 'masks').iterdir()) == KEPT
    assert make_masks(*coco, tmp_path / 'all', min_area=0)['kept'] == len(KEPT) + 1
    assert 'small' in (tmp_path / 'all' / 'list.txt').read_text().split()


def test_masks_have_vocs_palette(made):
    with Image.open(made / 'masks' / 'twenty.png') as mask:
        assert mask.mode == 'P' and mask.getpalette() == palette()


@pytest.mark.parametrize('after', range(len(KEPT) + 1))
def test_an_interrupted_run_resumes(coco, made, tmp_path, after):
    def stop(finished, description, total):
        assert total == len(KEPT)
        if description != 'Masks':
            return (yield from finished)
        for _ in range(after):
            yield next(finished)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make_masks(*coco, tmp_path, progress=stop)
    assert not (tmp_path / 'list.txt').exists()
    before = stamps(tmp_path)
    assert len(before) == after
    if after < len(KEPT):  # what a process that was killed while it wrote would leave
        (tmp_path / 'masks' / f'.{KEPT[-1]}.png.partial').write_bytes(b'half')
    assert make_masks(*coco, tmp_path)['made'] == len(KEPT) - after
    assert contents(tmp_path) == contents(made)
    assert before.items() <= stamps(tmp_path).items()


def test_a_failed_run_resumes_once_the_image_is_repaired(coco, made, tmp_path):
    annotations, images = write_coco(tmp_path / 'coco', coco_of(SHOWN))
    whole = (images / 'sum.jpg').read_bytes()
    (images / 'sum.jpg').write_bytes(whole[:20])
    with pytest.raises(CSGError, match='sum.jpg cannot be read .* copy it again'):
        make_masks(annotations, images, tmp_path / 'out')
    (images / 'sum.jpg').write_bytes(whole)
    assert 0 < make_masks(annotations, images, tmp_path / 'out')['made'] < len(KEPT)
    assert contents(tmp_path / 'out') == contents(made)


def test_a_repeated_run_changes_nothing(coco, made):
    before = stamps(made) | {'list': (made / 'list.txt').stat().st_mtime_ns}
    assert make_masks(*coco, made)['made'] == 0
    assert stamps(made) | {'list': (made / 'list.txt').stat().st_mtime_ns} == before


def test_other_annotations_or_options_into_the_same_folder_are_refused(made, coco, tmp_path):
    before = contents(made)
    other = write_coco(tmp_path / 'other', coco_of({**SHOWN, 'sum': SHOWN['parts']}))
    with pytest.raises(CSGError, match='made with other annotations; choose another folder'):
        make_masks(*other, made)
    with pytest.raises(CSGError, match='made with other min_area; choose another folder'):
        make_masks(*coco, made, min_area=1)
    assert contents(made) == before


@pytest.mark.parametrize('record', [None, '', '[]', '\xff'])
def test_a_foreign_folder_is_refused(coco, tmp_path, record):
    (tmp_path / 'mine.txt').write_text('kept')
    if record is not None:
        (tmp_path / 'made_from.json').write_text(record, encoding='latin-1')
    before = contents(tmp_path)
    with pytest.raises(CSGError, match='choose another folder'):
        make_masks(*coco, tmp_path)
    with pytest.raises(CSGError, match=r'mine.txt cannot be used .* choose another folder'):
        make_masks(*coco, tmp_path / 'mine.txt')
    assert contents(tmp_path) == before and not (tmp_path / 'masks').exists()


@pytest.mark.parametrize('wrong', [{'jobs': 0}, {'min_area': -1}])
def test_arguments_out_of_range_are_refused(coco, tmp_path, wrong):
    with pytest.raises(CSGError, match='jobs start at 1 and min_area at 0'):
        make_masks(*coco, tmp_path, **wrong)


@pytest.mark.parametrize(
    ('text', 'says'),
    [
        (None, 'cannot be read .* give an instances_'),
        ('{"images": [', 'not JSON .* copy it again'),
        ('[' * 100000, 'not JSON'),
        ('[]', 'no list of images'),
        ('{"images": [], "categories": []}', 'no list of annotations'),
        ('{"images": [], "annotations": []}', 'no list of categories'),
        ('{"images": [], "annotations": [], "categories": [{"id": 25, "name": "giraffe"}]}', 'no category has a name'),
    ],
)
def test_a_file_without_coco_instances_is_refused(coco, tmp_path, text, says):
    if text is not None:
        (tmp_path / 'wrong.json').write_text(text)
    with pytest.raises(CSGError, match=f'wrong.json.*{says}'):
        make_masks(tmp_path / 'wrong.json', coco[1], tmp_path / 'out')
    assert not (tmp_path / 'out').exists()


@pytest.mark.parametrize(
    ('part', 'entry', 'says'),
    [
        ('annotations', {'image_id': 99}, r'annotations\[0\] refers to image 99, .* delete the annotation'),
        ('annotations', {'category_id': 99}, r'annotations\[0\] refers to category 99, .* delete the annotation'),
        ('annotations', {'category_id': None}, r"annotations\[0\] has no valid 'category_id'"),
        ('annotations', {'area': 'big'}, r"annotations\[0\] has no valid 'area'"),
        ('annotations', {'area': 1}, 'no image shows more than 1000 pixels .* lower min_area'),
        ('images', {'height': 'tall'}, r"images\[0\] has no valid 'height'"),
        ('images', {'file_name': '../one.jpg'}, "'../one.jpg' is not named NAME.jpg, .* rename it"),
        ('images', {'file_name': 'one.png'}, "'one.png' is not named NAME.jpg, .* rename it"),
        ('categories', {'id': 2}, r'categories\[1\] has the id 2 of another one'),
    ],
)
def test_entries_that_do_not_fit_together_are_refused(tmp_path, part, entry, says):
    annotations, images = write_coco(tmp_path, coco_of({'one': [instance(AIRPLANE, [box(1, 1, 9, 9)])]}))
    wrong = json.loads(annotations.read_text())
    wrong[part][0].update(entry)
    annotations.write_text(json.dumps(wrong))
    with pytest.raises(CSGError, match=f'instances.json: .*{says}'):
        make_masks(annotations, images, tmp_path / 'out')
    assert not (tmp_path / 'out').exists()


SHORT = compressed(blot(4))
SHORT['counts'] = SHORT['counts'][:-4]


@pytest.mark.parametrize(
    ('segmentation', 'says'),
    [
        ([[1, 2, 3, 4, 5, 6, 7]], 'a polygon of 7 numbers'),
        ([[1, 2, 3, 4, 5, float('inf')]], 'far outside'),
        ([[1, 2, 3, 4, 5, float('nan')]], 'far outside'),
        ({'size': [53, 37], 'counts': [37 * 53]}, r'an RLE of size \[53, 37\] for an image of \[37, 53\]'),
        ({'size': [37, 53], 'counts': [37 * 53 - 1]}, 'do not add up to the 37 x 53 pixels'),
        ({'size': [37, 53], 'counts': [-1, 37 * 53 + 1]}, 'do not add up'),
        (SHORT, 'do not add up'),
        ({'size': [37, 53], 'counts': 'é'}, 'do not add up'),
        ({'size': [37, 53]}, 'a mask of unknown type'),
        ([1, 2, 3, 4, 5, 6], 'a mask of unknown type'),
        ([['a', 'b', 'c', 'd', 'e', 'f']], 'a mask of unknown type'),
        ('mask.png', 'a mask of unknown type'),
        (None, 'a mask of unknown type'),
    ],
)
def test_masks_that_cannot_be_drawn_are_refused(tmp_path, segmentation, says):
    paths = write_coco(tmp_path, coco_of({'one': [instance(AIRPLANE, segmentation)]}))
    with pytest.raises(CSGError, match=f'annotation 1 of one.jpg has .*{says}.*; correct the annotation or delete it'):
        make_masks(*paths, tmp_path / 'out')
    assert not (tmp_path / 'out').exists()


def test_two_images_of_one_name_are_refused(tmp_path):
    coco = coco_of({'one': SHOWN['parts'], 'two': SHOWN['parts']})
    coco['images'][1]['file_name'] = 'one.jpg'
    with pytest.raises(CSGError, match='two images have the file name one.jpg'):
        make_masks(*write_coco(tmp_path, coco), tmp_path / 'out')


def test_missing_images_are_counted_before_work_starts(coco, tmp_path):
    annotations, images = write_coco(tmp_path, coco_of(SHOWN))
    for name in ('rle', 'twins', 'small'):
        (images / f'{name}.jpg').unlink()
    with pytest.raises(CSGError, match='2 of 6 images are missing, the first rle.jpg; give the folder'):
        make_masks(annotations, images, tmp_path / 'out')
    with pytest.raises(CSGError, match='absent: no such folder; give the folder with crowd.jpg'):
        make_masks(annotations, tmp_path / 'absent', tmp_path / 'out')
    assert not (tmp_path / 'out').exists()


def test_images_of_another_size_are_refused(tmp_path):
    annotations, images = write_coco(tmp_path, coco_of({'one': SHOWN['parts']}))
    Image.new('RGB', SIZE).save(images / 'one.jpg')
    with pytest.raises(CSGError, match='one.jpg has 53 x 37 pixels and 37 x 53 in the annotations; give the folder'):
        make_masks(annotations, images, tmp_path / 'out')


@pytest.fixture
def tool(monkeypatch):
    """Run coco2voc.py in this process."""

    def run(*args) -> None:
        monkeypatch.setattr(sys, 'argv', ['coco2voc.py', *map(str, args)])
        runpy.run_path(str(ROOT / 'tools' / 'dataset_converters' / 'coco2voc.py'), run_name='__main__')

    return run


def test_the_tool_with_two_jobs_makes_the_same_files(coco, made, tmp_path, tool, capsys):
    tool(*coco, '--out', tmp_path, '--jobs', 2, '--json')
    printed = capsys.readouterr()
    assert json.loads(printed.out) == {'out': str(tmp_path), 'images': len(SHOWN), 'kept': 6, 'made': 6}
    assert 'Masks' in printed.err
    assert contents(tmp_path) == contents(made)


def test_the_tool_ends_in_one_line(coco, tmp_path, tool, capsys):
    for annotations, says in ((tmp_path / 'absent.json', 'absent.json cannot be read'), (coco[0], 'no such folder')):
        with pytest.raises(SystemExit) as end:
            tool(annotations, tmp_path / 'absent', '--out', tmp_path)
        message = str(end.value.code)
        assert message.startswith('error: ') and says in message and '\n' not in message
    assert capsys.readouterr().out == '' and list(tmp_path.iterdir()) == []


def test_the_config_trains_on_what_the_tool_wrote(coco, made):
    pytest.importorskip('mmseg')
    from mmengine.config import Config
    from mmengine.runner import Runner
    from mmseg.datasets import PascalVOCDataset
    from mmseg.registry import MODELS

    from csg_seg.mm.datasets.segmentation import COCOVOCDataset
    from csg_seg.running.preflight import check_data

    name = 'csg-s16-d128_deeplabv3_r50-d8_4xb8-30e_coco-voc-480x480.py'
    cfg = Config.fromfile(ROOT / 'configs' / 'deeplabv3' / name)
    prefix = dict(img_path=str(coco[1]), seg_map_path=str(made / 'masks'))
    cfg.train_dataloader.dataset.update(data_root=None, data_prefix=prefix, ann_file=str(made / 'list.txt'))
    check_data(cfg, 'train')
    cfg.train_dataloader.update(batch_size=2, num_workers=0, persistent_workers=False)
    loader = Runner.build_dataloader(cfg.train_dataloader, seed=0)
    assert isinstance(loader.dataset, COCOVOCDataset) and len(loader.dataset) == len(KEPT)
    assert loader.dataset.metainfo['classes'] == PascalVOCDataset.METAINFO['classes']
    batch = MODELS.build(cfg.model.data_preprocessor)(next(iter(loader)), training=True)
    assert batch['inputs'].shape == (2, 3, 480, 480)
    for sample in batch['data_samples']:
        assert sample.gt_sem_seg.data.shape == (1, 480, 480)
        assert set(sample.gt_sem_seg.data.unique().tolist()) <= {*range(21), 255}
    assert cfg.val_dataloader.dataset.type == cfg.test_dataloader.dataset.type == 'PascalVOCDataset'
    assert len(cfg.param_scheduler) == 1 and cfg.param_scheduler[0].end == cfg.train_cfg.max_iters == 30 * 2891
