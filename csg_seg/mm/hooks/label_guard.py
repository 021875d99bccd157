"""LabelGuardHook: name the mask whose label made a training fail, or would spoil a score."""

from collections.abc import Iterator, Mapping
from types import TracebackType
from typing import Any

from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.runner import Runner
from mmengine.structures import BaseDataElement

from csg_seg.errors import CSGError
from csg_seg.mm.datasets.labels import check_mask


class LabelGuardHook(Hook):
    """Find masks with labels that are not classes during a run.

    Use it as a context manager around the run. Training checks a batch only after an
    error, which says nothing about the label. Validation and test check every batch,
    because they would count such pixels as mistakes.
    """

    def __init__(self, cfg: Config):
        self._cfg = cfg
        self._batch: Any = None

    def __enter__(self) -> 'LabelGuardHook':
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        if isinstance(error, Exception) and not isinstance(error, CSGError):
            self._check(self._batch, 'train')

    def _before_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None, mode: str = 'train') -> None:
        if mode == 'train':
            self._batch = data_batch
        else:
            self._check(data_batch, mode)

    def after_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        """Release the batch."""
        self._batch = None

    def _check(self, batch: Any, split: str) -> None:
        for sample in _samples(batch.get('data_samples') if isinstance(batch, Mapping) else None):
            if 'gt_sem_seg' in sample:
                path = sample.get('seg_map_path') or sample.get('img_path') or 'a mask'
                check_mask(self._cfg, split, sample.gt_sem_seg.data.cpu().numpy(), path)


def _samples(nested: Any) -> Iterator[BaseDataElement]:
    """Yield the samples of a batch; test-time augmentation nests them in lists of lists."""
    if isinstance(nested, BaseDataElement):
        yield nested
    elif isinstance(nested, (list, tuple)):
        for each in nested:
            yield from _samples(each)
