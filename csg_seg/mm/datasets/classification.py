"""Classification data sets that mmpretrain lacks: NumPy and tar archives, and image folders with broken files."""

import io
import lzma
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache, lru_cache
from pathlib import PurePosixPath
from typing import Any

import numpy as np
from mmengine.dist import is_main_process
from mmengine.logging import print_log
from mmengine.registry import DATASETS
from mmpretrain.datasets import BaseDataset, CustomDataset
from PIL import Image
from rich.console import Console
from rich.progress import track

from csg_seg.errors import CSGError


@DATASETS.register_module()
class NPZDataset(BaseDataset):
    """Images and labels in one ``.npz`` file.

    The file contains ``x_train`` and ``x_test``, uint8 RGB images ``(n, h, w, 3)``, and
    ``y_train`` and ``y_test``, integers ``(n,)``. Nothing in it is unpickled.

    Args:
        ann_file: the file, relative to ``data_root``.
        split: 'train' or 'test'.
        kwargs: arguments of :class:`mmpretrain.datasets.BaseDataset`.

    Raises:
        CSGError: the file is damaged, an array is missing, or the arrays do not match.
    """

    def __init__(self, ann_file: str, split: str = 'train', **kwargs: Any):
        self.split = split
        super().__init__(ann_file, **kwargs)

    def load_data_list(self) -> list[dict]:
        """Return a dict with ``img`` and ``gt_label`` for each image."""
        images, labels = self._read(f'x_{self.split}'), self._read(f'y_{self.split}')
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3:
            raise CSGError(
                f'{self.ann_file}: x_{self.split} is {images.dtype} {images.shape}; images must be uint8 (n, h, w, 3)'
            )
        if labels.shape != images.shape[:1] or not np.issubdtype(labels.dtype, np.integer):
            raise CSGError(
                f'{self.ann_file}: y_{self.split} is {labels.dtype} {labels.shape}; '
                f'{len(images)} images need integers ({len(images)},)'
            )
        classes = len(self.CLASSES or ()) or np.inf
        if len(labels) and not 0 <= labels.min() <= labels.max() < classes:
            raise CSGError(
                f'{self.ann_file}: y_{self.split} has labels from {labels.min()} to {labels.max()}; '
                f'{classes} classes are numbered from 0'
            )
        return [dict(img=image, gt_label=int(label)) for image, label in zip(images, labels, strict=True)]

    def _read(self, key: str) -> np.ndarray:
        try:
            with np.load(self.ann_file, allow_pickle=False) as arrays:
                if key not in arrays.files:
                    raise CSGError(f'{self.ann_file}: no array {key!r}; found {", ".join(arrays.files)}')
                return arrays[key]
        except CSGError:
            raise
        except (ValueError, TypeError, AttributeError, EOFError, zipfile.BadZipFile, zlib.error):
            raise CSGError(
                f'{self.ann_file}: damaged, not an .npz file, or it contains pickled objects, which are not read; '
                'copy it again'
            ) from None


@DATASETS.register_module()
class TarDataset(BaseDataset):
    """Images in one tar archive, ``SPLIT/CLASS/*``, decoded once and kept in memory as RGB.

    The archive may be compressed. Classes are numbered as in ``metainfo``, or in alphabetical order.

    Args:
        ann_file: the archive, relative to ``data_root``.
        split: 'train', 'test' or another top folder of the archive.
        kwargs: arguments of :class:`mmpretrain.datasets.BaseDataset`.

    Raises:
        CSGError: the archive or an image is damaged, or there are no images or other classes.
    """

    def __init__(self, ann_file: str, split: str = 'train', **kwargs: Any):
        self.split = split
        super().__init__(ann_file, **kwargs)

    def load_data_list(self) -> list[dict]:
        """Return a dict with ``img`` and ``gt_label`` for each image, ordered by class and name."""
        images = _decoded(self.ann_file, self.split)
        found = sorted({folder for folder, _ in images})
        classes = list(self.CLASSES or found)
        if not images or found != sorted(classes):
            raise CSGError(
                f'{self.ann_file}: {self.split}/ has the classes {", ".join(found) or "(none)"}; '
                f'wanted are {", ".join(classes) or "images in SPLIT/CLASS/"}'
            )
        self._metainfo['classes'] = tuple(classes)
        return [dict(img=images[key], gt_label=classes.index(key[0])) for key in sorted(images)]


@lru_cache(maxsize=2)  # a run builds the data sets of two splits more than once
def _decoded(path: str, split: str) -> dict[tuple[str, str], np.ndarray]:
    """Return the images of a split, by class and file name."""
    images = {}
    try:
        with tarfile.open(path) as archive:
            for member in archive:
                name = PurePosixPath(member.name)
                file = archive.extractfile(member) if member.isfile() else None
                if file and name.parent.parent == PurePosixPath(split):
                    images[name.parent.name, name.name] = (member.name, file.read())
    except (tarfile.TarError, lzma.LZMAError, zlib.error, EOFError) as error:
        raise CSGError(f'{path}: damaged, or not a tar archive ({_one_line(error)}); copy it again') from None
    return {key: _decode(path, *each) for key, each in images.items()}


def _decode(path: str, name: str, data: bytes) -> np.ndarray:
    try:
        with Image.open(io.BytesIO(data)) as image:
            return np.asarray(image.convert('RGB'))
    except Exception as error:  # decoding a damaged file may raise anything
        raise CSGError(f'{path}: {name} is broken ({_one_line(error)}); copy the archive again') from None


@DATASETS.register_module()
class ImageFolderDataset(CustomDataset):
    """A folder of images for each class. Every image is decoded once before training starts.

    Args:
        broken: 'refuse' to raise an error if an image cannot be decoded, 'skip' to leave such images out.
        kwargs: arguments of :class:`mmpretrain.datasets.CustomDataset`.

    Raises:
        CSGError: an image is broken and ``broken`` is 'refuse'.
    """

    def __init__(self, *, broken: str = 'refuse', **kwargs: Any):
        if broken not in ('refuse', 'skip'):
            raise CSGError(f"broken must be 'refuse' or 'skip'; got {broken!r}")
        self.broken = broken
        super().__init__(**kwargs)

    def load_data_list(self) -> list[dict]:
        """Return a dict with ``img_path`` and ``gt_label`` for each image that can be decoded."""
        samples = super().load_data_list()
        broken = dict(_broken_images([sample['img_path'] for sample in samples]))
        if broken:
            path, reason = next(iter(broken.items()))
            found = f'{self.img_prefix}: {len(broken)} of {len(samples)} images are broken, the first {path} ({reason})'
            if self.broken == 'refuse':
                raise CSGError(f"{found}; repair it, or leave broken images out with dataset.broken='skip'")
            print_log(f'{found}; left out', logger='current')
        return [sample for sample in samples if sample['img_path'] not in broken]


def _broken_images(paths: list[str]) -> Iterator[tuple[str, str]]:
    """Yield the path of each image that cannot be decoded completely, and the reason."""
    quiet, stderr = not is_main_process(), Console(stderr=True)
    with ThreadPoolExecutor() as pool:
        defects = pool.map(_defect, paths)
        bar = track(defects, 'Checking images', total=len(paths), console=stderr, disable=quiet)
        yield from ((path, defect) for path, defect in zip(paths, bar, strict=True) if defect)


@cache  # a run builds the data set more than once
def _defect(path: str) -> str | None:
    """Return why an image cannot be decoded, or None if it can."""
    try:
        with Image.open(path) as image:
            image.load()
    except Exception as error:  # decoding a damaged file may raise anything
        return _one_line(error)
    return None


def _one_line(error: Exception) -> str:
    return ' '.join(str(error).split())[:120]
