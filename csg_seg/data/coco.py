"""Convert COCO's instances to masks of Pascal VOC's 20 classes, to train on COCO and test on VOC.

The rules are those of torchvision's segmentation reference (pytorch/vision, ``references/segmentation/coco_utils.py``):
other categories are background, a pixel inside several instances is ignored, and an image is used if the areas of its
instances add up to more than 1000 pixels. One rule differs: a crowd region, which outlines many objects as one, is
ignored here; torchvision labels it as an instance.
"""

import hashlib
import json
import math
import os
import re
import signal
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Mapping
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from multiprocessing import get_context, parent_process
from pathlib import Path
from typing import Any

import numpy as np
from numpy import ndarray
from PIL import Image
from pycocotools import mask as coco_mask

from csg_seg.errors import CSGError
from csg_seg.files import write_whole

from .drawn import palette

# Increased whenever the same annotations would give other masks.
VERSION = 1
IGNORE = 255
# COCO's names for VOC's classes, in VOC's order from id 1; VOC has other names for some.
CLASSES = (
    'airplane', 'bicycle', 'bird', 'boat', 'bottle', 'bus', 'car', 'cat', 'chair', 'cow', 'dining table', 'dog',
    'horse', 'motorcycle', 'person', 'potted plant', 'sheep', 'couch', 'train', 'tv',
)  # fmt: skip

# Polygons, each a list x, y, x, y, ...; or a dict with size (height, width) and run lengths (RLE), plain or compressed.
Segmentation = list[list[float]] | dict[str, Any]
Progress = Callable[..., Iterable]
Id = int | str

_IMAGE = {'id': Id, 'file_name': str, 'height': int, 'width': int}
_CATEGORY = {'id': Id, 'name': str}
_ANNOTATION = {'image_id': Id, 'category_id': Id}
_INSTANCE = {'area': (int, float)}
_UNKNOWN = 'a mask of unknown type, not polygons or run lengths'


@dataclass(frozen=True)
class Scene:
    """The instances of VOC's classes in one image.

    Attributes:
        name: the image's file name without its suffix.
        size: ``(height, width)`` in pixels.
        instances: label and mask of each; the label is a class id, or 255 for a crowd region.
    """

    name: str
    size: tuple[int, int]
    instances: list[tuple[int, Segmentation]]


def make_masks(
    annotations: str | Path,
    images: str | Path,
    out: str | Path,
    *,
    min_area: float = 1000,
    jobs: int = 1,
    progress: Progress | None = None,
) -> dict[str, int]:
    """Write ``out/masks/NAME.png`` for every image that shows enough of VOC's classes, then ``out/list.txt``.

    Existing masks are kept: if interrupted, call it again to resume.

    Args:
        annotations: COCO's JSON file of instances, such as ``instances_train2017.json``.
        images: folder of the images it lists, ``NAME.jpg``.
        out: folder to write into; created if it does not exist.
        min_area: an image is used if the areas of its instances of VOC's classes, crowd regions included, add up to
            more pixels than this.
        jobs: number of parallel processes; each takes about half a GB of memory.
        progress: shows progress, as ``rich.progress.track`` does; called with an iterable, a ``description`` and the
            number of items as ``total``.

    Returns:
        The number of ``images`` listed, of those that were ``kept``, and of masks ``made`` in this call.

    Raises:
        CSGError: an argument is out of range, the annotations are not consistent COCO instances, an image is missing
            or has another size, or ``out`` holds something else.
    """
    if jobs < 1 or min_area < 0:
        raise CSGError(f'cannot work with jobs={jobs}, min_area={min_area}: jobs start at 1 and min_area at 0')
    annotations, images, out = Path(annotations), Path(images), Path(out)
    scenes, listed, digest = _read(annotations, min_area, progress)
    _check_images(images, scenes)
    masks = _claim(out, {'version': VERSION, 'annotations': digest, 'min_area': min_area})
    todo = [scene for scene in scenes if not (masks / f'{scene.name}.png').exists()]
    # Closed as soon as the caller is interrupted, so that no process continues.
    with closing(_run(partial(_make_mask, images, masks), todo, jobs)) as finished:
        for _ in _wrap(progress, finished, description='Masks', total=len(todo)):
            pass
    # Written last: if there is a list, all masks exist.
    if not (out / 'list.txt').exists():
        write_whole(out / 'list.txt', lambda file: file.write_text(''.join(f'{scene.name}\n' for scene in scenes)))
    return {'images': listed, 'kept': len(scenes), 'made': len(todo)}


def select_scenes(coco: Mapping[str, list], min_area: float, *, progress: Progress | None = None) -> list[Scene]:
    """Return the images that show more than ``min_area`` pixels of VOC's classes, sorted by name.

    Args:
        coco: content of COCO's JSON file: images, annotations, categories.
        min_area: compared with the sum of the annotations' areas, as in torchvision.
        progress: see :func:`make_masks`.

    Raises:
        CSGError: an entry is incomplete, refers to one that is not listed, or has a mask that cannot be drawn.
    """
    images, categories = _by_id(coco, 'images', _IMAGE), _by_id(coco, 'categories', _CATEGORY)
    labels = {key: 1 + CLASSES.index(each['name']) for key, each in categories.items() if each['name'] in CLASSES}
    if not labels:
        raise CSGError("no category has a name that COCO gives to one of VOC's classes; give an instances_*.json file")
    instances: dict[Id, list[dict]] = {key: [] for key in images}
    for position, annotation in enumerate(coco['annotations']):
        where = f'annotations[{position}]'
        _check_fields(annotation, where, _ANNOTATION)
        for what, listed in (('image', images), ('category', categories)):
            key = annotation[f'{what}_id']
            if key not in listed:
                raise CSGError(
                    f'{where} refers to {what} {key!r}, which is not listed; add it or delete the annotation'
                )
        if annotation['category_id'] in labels:
            _check_fields(annotation, where, _INSTANCE)
            instances[annotation['image_id']].append(annotation)
    kept = [key for key in images if sum(each['area'] for each in instances[key]) > min_area]
    if not kept:
        raise CSGError(f"no image shows more than {min_area:g} pixels of VOC's classes; lower min_area")
    checked = _wrap(progress, kept, description='Annotations', total=len(kept))
    scenes = sorted((_scene(images[key], instances[key], labels) for key in checked), key=lambda scene: scene.name)
    for scene, following in pairwise(scenes):
        if scene.name == following.name:
            raise CSGError(f'two images have the file name {scene.name}.jpg and would share one mask; rename one')
    return scenes


def paint(scene: Scene) -> ndarray:
    """Draw a scene's mask, ``(height, width)`` uint8: 0 background, 1 to 20 VOC's classes, 255 ignored."""
    labels = np.zeros(scene.size, np.uint8)
    for label, segmentation in scene.instances:
        if isinstance(segmentation, list):
            # Fewer than three points have no area; pycocotools would read two as a box.
            polygons = [polygon for polygon in segmentation if len(polygon) >= 6]
            if not polygons:
                continue
            rle = coco_mask.merge(coco_mask.frPyObjects(polygons, *scene.size))
        elif isinstance(segmentation['counts'], list):
            rle = coco_mask.frPyObjects(segmentation, *scene.size)
        else:
            rle = segmentation
        inside = coco_mask.decode(rle).astype(bool)
        labels[inside] = np.where(labels[inside] == 0, label, IGNORE)
    return labels


def _read(annotations: Path, min_area: float, progress: Progress | None) -> tuple[list[Scene], int, str]:
    """Return the scenes in COCO's JSON file, the number of images it lists, and its SHA-256."""
    try:
        content = annotations.read_bytes()
    except OSError as error:
        raise CSGError(f'{annotations} cannot be read ({error.strerror}); give an instances_*.json file') from None
    try:
        coco = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise CSGError(f'{annotations}: not JSON ({error}); give an instances_*.json file, or copy it again') from None
    for part in ('images', 'annotations', 'categories'):
        if not isinstance(coco, dict) or not isinstance(coco.get(part), list):
            raise CSGError(f'{annotations}: not COCO instances, no list of {part}; give an instances_*.json file')
    try:
        scenes = select_scenes(coco, min_area, progress=progress)
    except CSGError as error:
        raise CSGError(f'{annotations}: {error}') from None
    return scenes, len(coco['images']), hashlib.sha256(content).hexdigest()


def _wrap(progress: Progress | None, each: Iterable, *, description: str, total: int) -> Iterable:
    return progress(each, description=description, total=total) if progress and total else each


def _check_fields(entry: Any, where: str, fields: Mapping[str, Any]) -> None:
    for name, wanted in fields.items():
        if not isinstance(entry, dict) or not isinstance(entry.get(name), wanted):
            raise CSGError(f'{where} has no valid {name!r}; give an instances_*.json file')


def _by_id(coco: Mapping[str, list], part: str, fields: Mapping[str, Any]) -> dict[Id, dict]:
    entries = {}
    for position, entry in enumerate(coco[part]):
        _check_fields(entry, f'{part}[{position}]', fields)
        if entry['id'] in entries:
            raise CSGError(f'{part}[{position}] has the id {entry["id"]!r} of another one; make the ids unique')
        entries[entry['id']] = entry
    return entries


def _scene(image: dict, instances: list[dict], labels: Mapping[Id, int]) -> Scene:
    if not re.fullmatch(r'[^/\n]+\.jpg', image['file_name']):
        raise CSGError(f'image {image["file_name"]!r} is not named NAME.jpg, which COCOVOCDataset reads; rename it')
    size = (image['height'], image['width'])
    for each in instances:
        fault = _fault(each.get('segmentation'), size)
        if fault:
            raise CSGError(
                f'annotation {each.get("id")} of {image["file_name"]} has {fault}; correct the annotation or delete it'
            )
    masks = [(IGNORE if x.get('iscrowd') else labels[x['category_id']], x['segmentation']) for x in instances]
    return Scene(image['file_name'].removesuffix('.jpg'), size, masks)


def _fault(segmentation: Any, size: tuple[int, int]) -> str | None:
    """Return why a segmentation cannot be drawn as a mask of ``size``, or None."""
    if isinstance(segmentation, list):
        return next(filter(None, (_polygon_fault(each, size) for each in segmentation)), None)
    counts = segmentation.get('counts') if isinstance(segmentation, dict) else None
    if not isinstance(counts, (list, str)):
        return _UNKNOWN
    if segmentation.get('size') != [*size]:
        return f'an RLE of size {segmentation.get("size")} for an image of {[*size]}'
    runs = counts if isinstance(counts, list) else _decompress(counts)
    # pycocotools leaves pixels after the last run uninitialised.
    if not all(isinstance(run, int) and run >= 0 for run in runs) or sum(runs) != size[0] * size[1]:
        return f'an RLE whose runs do not add up to the {size[0]} x {size[1]} pixels of its image'
    return None


def _polygon_fault(polygon: Any, size: tuple[int, int]) -> str | None:
    try:
        finite = math.isfinite(sum(polygon))
    except (TypeError, OverflowError):
        return _UNKNOWN
    if len(polygon) % 2:
        return f'a polygon of {len(polygon)} numbers, not pairs of x and y'
    if not polygon:
        return None
    # pycocotools steps along the outline and would never reach a point at infinity.
    return None if finite and max(map(abs, polygon)) <= 10 * max(size) else 'a polygon far outside its image'


def _decompress(counts: str) -> list[int]:
    """Return the run lengths in a compressed RLE, or none if the text is not one.

    As in ``rleFrString`` of cocoapi's ``maskApi.c``: five bits per character, the lowest first; from the fourth run
    on, a run is stored as its difference from the run two before.
    """
    if not re.fullmatch('(?:[P-o]*[0-O])*', counts):
        return []
    runs: list[int] = []
    for digits in re.findall('[P-o]*[0-O]', counts):
        bits = [ord(digit) - ord('0') for digit in digits]
        value = sum((bit & 31) << (5 * place) for place, bit in enumerate(bits))
        if bits[-1] & 16:
            value -= 1 << (5 * len(bits))
        runs.append(value + (runs[-2] if len(runs) > 2 else 0))
    return runs


def _check_images(images: Path, scenes: list[Scene]) -> None:
    names = [f'{scene.name}.jpg' for scene in scenes]
    if not images.is_dir():
        raise CSGError(f'{images}: no such folder; give the folder with {names[0]}')
    missing = [name for name in names if not (images / name).is_file()]
    if missing:
        raise CSGError(
            f'{images}: {len(missing)} of {len(names)} images are missing, the first {missing[0]}; '
            'give the folder of the annotated images'
        )


def _claim(out: Path, made_from: dict[str, Any]) -> Path:
    """Return the folder of masks in ``out``, which must be empty or hold masks made from the same annotations."""
    record, masks = out / 'made_from.json', out / 'masks'
    remedy = 'choose another folder, or delete this one'
    try:
        out.mkdir(parents=True, exist_ok=True)
        if not any(out.iterdir()):
            write_whole(record, lambda file: file.write_text(json.dumps(made_from) + '\n'))
        if not record.exists():
            raise CSGError(f'{out} is not empty and no made_from.json says what is in it; {remedy}')
        found = json.loads(record.read_text())
        if found == made_from:
            masks.mkdir(exist_ok=True)
            for unfinished in masks.glob('.*.partial'):  # from a process that was killed
                unfinished.unlink()
            return masks
    except OSError as error:
        raise CSGError(f'{out} cannot be used ({error.strerror}); choose another folder') from None
    except (json.JSONDecodeError, UnicodeDecodeError):
        found = None
    other = [key for key, value in made_from.items() if not isinstance(found, dict) or found.get(key) != value]
    raise CSGError(f'{out} holds masks made with other {" and ".join(other)}; {remedy}')


def _run(work: Callable[[Scene], None], scenes: list[Scene], jobs: int) -> Generator[None, None, None]:
    """Yield once for each scene that is done."""
    if jobs == 1 or not scenes:
        yield from map(work, scenes)
        return
    pool = ProcessPoolExecutor(jobs, mp_context=get_context('spawn'), initializer=_follow_parent)
    # A short queue ends at once when interrupted; pool.map would hang here if a process was killed.
    waiting: deque[Future[None]] = deque()
    try:
        for scene in scenes:
            if len(waiting) == 8 * jobs:
                yield waiting.popleft().result()
            waiting.append(pool.submit(work, scene))
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool:
        raise CSGError('a process was killed, perhaps out of memory; repeat with fewer jobs') from None
    finally:
        pool.shutdown(cancel_futures=True)


def _follow_parent() -> None:
    """Ignore Ctrl-C, so that the parent process decides when this one ends, and end if the parent dies."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _make_mask(images: Path, masks: Path, scene: Scene) -> None:
    path = images / f'{scene.name}.jpg'
    try:
        with Image.open(path) as image:
            width, height = image.size
    except OSError as error:
        raise CSGError(f'{path} cannot be read ({error}); copy it again') from None
    if (height, width) != scene.size:
        raise CSGError(
            f'{path} has {height} x {width} pixels and {scene.size[0]} x {scene.size[1]} in the annotations; '
            'give the folder of the annotated images'
        )
    mask = Image.fromarray(paint(scene))
    mask.putpalette(palette())
    write_whole(masks / f'{scene.name}.png', partial(mask.save, format='PNG'))
