"""Check that labels are classes of the network."""

from collections.abc import Mapping
from copy import deepcopy
from typing import Any

import numpy as np
from mmengine.config import Config
from mmengine.dataset import BaseDataset
from mmengine.registry import TRANSFORMS

from csg_seg.errors import CSGError
from csg_seg.mm.config_parts import bare_type

# Number of masks to check before a run, spread over the data set; checking all would take too long.
MASKS = 16

# Packages whose transforms do not change labels, so the loss sees the labels that a mask file contains.
KNOWN = ('mmcv', 'mmengine', 'mmpretrain', 'mmseg')


def check_labels(cfg: Config, split: str, dataset: BaseDataset, pipeline: list[Mapping[str, Any]]) -> None:
    """Check a few masks of a segmentation data set, or the class of each image of a classification data set.

    Args:
        cfg: a complete config.
        split: 'train', 'val' or 'test'.
        dataset: the data set of the split, built without its pipeline.
        pipeline: the pipeline of the split.

    Raises:
        CSGError: a label is not a class of the network, or a file is not a mask.
    """
    classes = _class_count(cfg.model)
    if classes is None:
        return
    if 'decode_head' not in cfg.model:
        for sample in dataset.data_list:
            wrong = _wrong(np.asarray(sample.get('gt_label', 0)), classes, ignored=None)
            if wrong is not None:
                raise CSGError(
                    f'{split} data: {sample.get("img_path", "an image")} has class {wrong}, and '
                    f'model.head.num_classes is {classes} (0 to {classes - 1}); correct one of the two'
                )
        return
    steps = [each for each in pipeline if bare_type(each) == 'LoadAnnotations']
    if not steps or not all(_is_known(each['type']) for each in pipeline):
        return  # LabelGuardHook checks the masks during the run
    load = TRANSFORMS.build(steps[0])
    samples = [sample for sample in dataset.data_list if sample.get('seg_map_path')]
    for index in np.unique(np.linspace(0, len(samples) - 1, MASKS).astype(int)) if samples else []:
        path = samples[index]['seg_map_path']
        try:
            mask = load(deepcopy(samples[index]))['gt_seg_map']
        except Exception as error:  # decoding a damaged file may raise anything
            raise CSGError(f'{split} data: {path}: not a mask ({type(error).__name__}); copy it again') from None
        check_mask(cfg, split, mask, path)


def check_mask(cfg: Config, split: str, mask: np.ndarray, path: str) -> None:
    """Refuse a mask with a label that is neither a class of the network nor ignored.

    Raises:
        CSGError: names the label and the mask's ``path``.
    """
    classes, ignored = _class_count(cfg.model), _ignored(cfg, split)
    if classes is None:
        return
    wrong = _wrong(mask, classes, ignored)
    if wrong is not None:
        raise CSGError(
            f'{split} data: {path} has label {wrong}, and the network has classes 0 to {classes - 1} and ignores '
            f'{ignored}; correct num_classes, let ignore_index be {wrong}, or set reduce_zero_label=True if labels '
            'begin at 1'
        )


def _wrong(labels: np.ndarray, classes: int, ignored: int | None) -> int | None:
    """Return the first label that is neither a class nor ignored."""
    wrong = labels[((labels < 0) | (labels >= classes)) & (labels != ignored)]
    return int(wrong.flat[0]) if wrong.size else None


def _class_count(model: Mapping[str, Any]) -> int | None:
    """Return the number of labels of the network's last head."""
    head = _head(model)
    if head.get('num_classes') is None:
        return None
    return max(2, head['num_classes']) if head.get('out_channels') == 1 else head['num_classes']


def _ignored(cfg: Config, split: str) -> int:
    """Return the label that the loss or the metric ignores."""
    found = _head(cfg.model).get('ignore_index')
    if split != 'train':
        evaluators = cfg.get(f'{split}_evaluator') or {}
        first = evaluators[0] if isinstance(evaluators, (list, tuple)) else evaluators
        found = first.get('ignore_index')
    return 255 if found is None else found


def _head(model: Mapping[str, Any]) -> Mapping[str, Any]:
    model = model.get('module') or model  # inside test-time augmentation
    head = model.get('decode_head') or model.get('head') or {}
    return head[-1] if isinstance(head, (list, tuple)) else head


def _is_known(kind: Any) -> bool:
    with TRANSFORMS.switch_scope_and_registry(None) as registry:
        transform = registry.get(kind) if isinstance(kind, str) else kind
    return getattr(transform, '__module__', '').split('.')[0] in KNOWN
