"""Image classification data that mmpretrain does not read: arrays, and folders that may be damaged."""

import zipfile
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache
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
    """Images and labels of one ``.npz`` file.

    The file holds ``x_train`` and ``x_test``, ``(n, h, w, 3)`` in uint8 and RGB, and
    ``y_train`` and ``y_test``, ``(n,)`` integers. Nothing in it is unpickled.

    Args:
        ann_file: the file, below ``data_root``.
        split: 'train' or 'test'.
        kwargs: as :class:`mmpretrain.datasets.BaseDataset`.

    Raises:
        CSGError: the file is damaged, lacks an array, or arrays do not fit each other.
    """

    def __init__(self, ann_file: str, split: str = 'train', **kwargs: Any):
        self.split = split
        super().__init__(ann_file, **kwargs)

    def load_data_list(self) -> list[dict]:
        """Return a dict of ``img`` and ``gt_label`` for each image."""
        images, labels = self._read(f'x_{self.split}'), self._read(f'y_{self.split}')
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3:
            raise CSGError(
                f'{self.ann_file}: x_{self.split} is {images.dtype} {images.shape}; images are uint8 (n, h, w, 3)'
            )
        if labels.shape != images.shape[:1] or not np.issubdtype(labels.dtype, np.integer):
            raise CSGError(
                f'{self.ann_file}: y_{self.split} is {labels.dtype} {labels.shape}; '
                f'{len(images)} images need ({len(images)},) integers'
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
                    raise CSGError(f'{self.ann_file}: there is no array {key!r}; found {", ".join(arrays.files)}')
                return arrays[key]
        except CSGError:
            raise
        except (ValueError, TypeError, AttributeError, EOFError, zipfile.BadZipFile, zlib.error):
            raise CSGError(
                f'{self.ann_file}: damaged, no .npz file, or one with pickled objects, which are not read; '
                'copy it again'
            ) from None


@DATASETS.register_module()
class ImageFolderDataset(CustomDataset):
    """A folder of images for each class, every image decoded once before training starts.

    Args:
        broken: 'refuse' to stop at images that cannot be decoded, 'skip' to leave them out.
        kwargs: as :class:`mmpretrain.datasets.CustomDataset`.

    Raises:
        CSGError: an image is broken.
    """

    def __init__(self, *, broken: str = 'refuse', **kwargs: Any):
        if broken not in ('refuse', 'skip'):
            raise CSGError(f"broken must be 'refuse' or 'skip'; got {broken!r}")
        self.broken = broken
        super().__init__(**kwargs)

    def load_data_list(self) -> list[dict]:
        """Return a dict of ``img_path`` and ``gt_label`` for each sound image."""
        samples = super().load_data_list()
        broken = dict(_broken_images([sample['img_path'] for sample in samples]))
        if broken:
            path, reason = next(iter(broken.items()))
            found = f'{self.img_prefix}: {len(broken)} of {len(samples)} images are broken, the first {path} ({reason})'
            if self.broken == 'refuse':
                raise CSGError(f"{found}; mend it, or leave such images out with dataset.broken='skip'")
            print_log(f'{found}; left out', logger='current')
        return [sample for sample in samples if sample['img_path'] not in broken]


def _broken_images(paths: list[str]) -> Iterator[tuple[str, str]]:
    """Yield path and reason of each image that cannot be decoded to its end."""
    bar = dict(description='Checking images', console=Console(stderr=True), disable=not is_main_process())
    with ThreadPoolExecutor() as pool:
        for path, reason in zip(paths, track(pool.map(_defect, paths), total=len(paths), **bar), strict=True):
            if reason:
                yield path, reason


@cache  # the data set is built more than once in a run
def _defect(path: str) -> str | None:
    """Return why an image cannot be decoded, None when it can."""
    try:
        with Image.open(path) as image:
            image.load()
    except Exception as error:  # a damaged file may raise anything while it is decoded
        return ' '.join(str(error).split())[:120]
    return None
