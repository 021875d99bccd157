"""Labels that are no classes, found during a run."""

from collections.abc import Iterator, Mapping
from types import TracebackType
from typing import Any

from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.runner import Runner
from mmengine.structures import BaseDataElement

from csg_seg.errors import CSGError
from csg_seg.mm.datasets.labels import _check


class LabelGuardHook(Hook):
    """Say of a training that a label ended which one it was, and refuse to score by masks that hold such.

    A context manager: enter it around the run. Training has a look at the batch only once
    something failed; an evaluation would go on and count such pixels as mistakes.
    """

    def __init__(self, cfg: Config):
        self._cfg = cfg
        self._batch: Any = None

    def __enter__(self) -> 'LabelGuardHook':
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        if isinstance(error, Exception) and not isinstance(error, CSGError):
            self._check(self._batch, 'train')

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None) -> None:
        """Keep the batch for as long as it is trained on."""
        self._batch = data_batch

    def after_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        """Let the batch go."""
        self._batch = None

    def before_val_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None) -> None:
        """Look into the masks of a batch."""
        self._check(data_batch, 'val')

    def before_test_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None) -> None:
        """Look into the masks of a batch."""
        self._check(data_batch, 'test')

    def _check(self, batch: Any, split: str) -> None:
        for sample in _samples(batch.get('data_samples') if isinstance(batch, Mapping) else None):
            if 'gt_sem_seg' in sample:
                path = sample.get('seg_map_path') or sample.get('img_path') or 'a mask'
                _check(self._cfg, split, sample.gt_sem_seg.data.cpu().numpy(), path)


def _samples(nested: Any) -> Iterator[BaseDataElement]:
    """Yield the samples of a batch, which test-time augmentation has in lists of lists."""
    if isinstance(nested, BaseDataElement):
        yield nested
    elif isinstance(nested, (list, tuple)):
        for each in nested:
            yield from _samples(each)
