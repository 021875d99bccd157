"""Check data, optimizer and start weights before a run."""

from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

from mmengine.config import Config
from mmengine.dataset import BaseDataset
from mmengine.logging import MMLogger
from mmengine.model import BaseModule
from mmengine.optim import OptimWrapperDict, build_optim_wrapper
from mmengine.registry import DATASETS, init_default_scope
from torch import nn

from csg_seg.errors import CSGError, nearest
from csg_seg.layers.conv import generated_convs
from csg_seg.mm.checkpoints.reading import read_checkpoint
from csg_seg.mm.checkpoints.unpickling import check_file
from csg_seg.mm.config_parts import config_hooks, data_sets
from csg_seg.mm.datasets.labels import check_labels
from csg_seg.mm.mixed_precision import check_mixed_precision

# The values of IoUMetric's iou_metrics, and the scores that each gives beside aAcc.
SCORES = {
    'mIoU': ('mIoU', 'mAcc'),
    'mDice': ('mDice', 'mAcc'),
    'mFscore': ('mFscore', 'mPrecision', 'mRecall'),
}


def check_data(cfg: Config, split: str) -> None:
    """Check that every file of a split exists and that its labels are classes of the network.

    Args:
        cfg: a complete config.
        split: 'train', 'val' or 'test'.

    Raises:
        CSGError: a folder, a list, an image or a mask is missing, or a label is not a class of the network.
    """
    init_default_scope(cfg.get('default_scope', 'mmseg'))
    remedy = f'see docs/data.md, or set its data_root in {split}_dataloader'
    loader = cfg.get(f'{split}_dataloader')
    for dataset in data_sets(loader.dataset if loader else None):
        if dataset.get('backend_args') or '://' in str(dataset.get('data_root')):
            continue  # not on a local disk
        root = Path(dataset.get('data_root') or '.')
        prefix = dataset.get('data_prefix') or {}
        prefixes = [prefix] if isinstance(prefix, str) else prefix.values()
        parts = [root, *(root / part for part in prefixes if part)]
        if dataset.get('ann_file'):
            parts.append(root / dataset['ann_file'])
        for part in parts:
            if not part.exists():
                raise CSGError(f'{split} data: {part} does not exist; {remedy}')
        built = _build_dataset(split, dataset, remedy)
        _check_samples(split, root, built, remedy)
        _check_classes(split, cfg.model, built)
        check_labels(cfg, split, built, dataset.get('pipeline') or [])


def check_starts(cfg: Config) -> None:
    """Check that the checkpoints a training starts from exist and are complete.

    Raises:
        FileNotFoundError: there is no such file.
        CSGError: a file is cut short, or a setting is not a path.
    """
    model = cfg.model
    paths = [cfg.get('load_from'), (model.get('teacher') or {}).get('checkpoint'), model.get('pretrained')]
    paths += [part.get('generators_from') for part in (model, *config_hooks(cfg))]
    paths += [each.get('checkpoint') for part in (model, model.get('backbone')) for each in _init_cfgs(part)]
    for path in paths:
        if path and not isinstance(path, str):
            raise CSGError(f'{path!r} is not the path of a checkpoint to start from; give a path')
        if path and '://' not in path:
            check_file(path)


def check_backbone(cfg: Config, model: nn.Module) -> None:
    """Check that the backbone's weights to start from are of a backbone, which mmengine only logs.

    Args:
        cfg: a complete config, after :func:`check_starts`.
        model: the config's model.

    Raises:
        CSGError: no name in the file is one of the backbone's.
    """
    backbone = getattr(model, 'backbone', None)
    if not isinstance(backbone, BaseModule) or type(backbone).init_weights is not BaseModule.init_weights:
        return  # it may rename what it reads
    wanted = {name for name, _ in (*backbone.named_parameters(), *backbone.named_buffers())}
    wanted |= {f'{name}.weight' for name, _ in generated_convs(backbone)}
    for start in [{'checkpoint': cfg.model.get('pretrained')}, *_init_cfgs(cfg.model.get('backbone'))]:
        path = start.get('checkpoint')
        if not path or '://' in path:
            continue
        prefix = (start.get('prefix') or '').rstrip('.')
        given = read_checkpoint(path)['state_dict']
        names = [name.removeprefix('module.').removeprefix(f'{prefix}.' if prefix else '') for name in given]
        if wanted.isdisjoint(names):
            raise CSGError(
                f'{path}: no name is one of the backbone; its first is {next(iter(given), None)!r}. Load a whole '
                'network by load_from; for the backbone of a dense one, set pretrained=None and '
                "backbone=dict(init_cfg=dict(type='Pretrained', checkpoint=..., prefix='backbone.'))"
            )


def _init_cfgs(part: Mapping[str, Any] | None) -> list[Mapping[str, Any]]:
    """Return the ``init_cfg`` of a part of a model, which may be one dict or several."""
    given = (part or {}).get('init_cfg') or []
    return list(given) if isinstance(given, (list, tuple)) else [given]


def check_scores(cfg: Config, split: str) -> None:
    """Check the names of scores, which mmseg's ``IoUMetric`` does at the first validation.

    Args:
        cfg: a complete config.
        split: 'val' or 'test'.

    Raises:
        CSGError: names a score that does not exist.
    """
    for each in _evaluators(cfg, split):
        wanted = each.get('iou_metrics') or []
        for name in [wanted] if isinstance(wanted, str) else wanted:
            if each['type'] == 'IoUMetric' and name not in SCORES:
                raise CSGError(f'{split}_evaluator: iou_metrics has {name!r}; there are {", ".join(SCORES)}')
    best = ((cfg.get('default_hooks') or {}).get('checkpoint') or {}).get('save_best')
    for name in [best] if isinstance(best, str) else best or []:
        if split == 'val' and name != 'auto':
            check_score(cfg, split, name, given='default_hooks.checkpoint.save_best')


def check_score(cfg: Config, split: str, name: str, *, given: str) -> None:
    """Check the name of a score, if all evaluators are mmseg's ``IoUMetric``, whose scores are known.

    Args:
        cfg: a complete config.
        split: 'val' or 'test'.
        name: of the score.
        given: how the error begins.

    Raises:
        CSGError: there is no such score.
    """
    evaluators = _evaluators(cfg, split)
    known = {'aAcc', *(name for names in SCORES.values() for name in names)}
    if evaluators and all(each['type'] == 'IoUMetric' for each in evaluators) and name.rpartition('/')[2] not in known:
        raise CSGError(f'{given}: there is no score {name!r}; {nearest(name, sorted(known))}')


def _evaluators(cfg: Config, split: str) -> list[Mapping[str, Any]]:
    found = cfg.get(f'{split}_evaluator') or ()
    return [each for each in (found if isinstance(found, (list, tuple)) else [found]) if 'type' in each]


def check_optimizer(cfg: Config, model: nn.Module) -> None:
    """Check that mmengine can build and use the config's optimizer on this machine.

    Args:
        cfg: a complete config.
        model: the config's model.

    Raises:
        CSGError: the optimizer cannot be built or used.
    """
    settings = cfg.get('optim_wrapper')
    if settings is None:
        return
    kind = settings.get('type', 'OptimWrapper')
    if str(getattr(kind, '__name__', kind)).rpartition('.')[2] == 'AmpOptimWrapper':
        check_mixed_precision(settings.get('dtype'))
    logger = MMLogger.get_current_instance()
    level = logger.level
    logger.setLevel('WARNING')  # the run itself logs the options of paramwise_cfg
    try:
        built = build_optim_wrapper(model, deepcopy(settings))
        for _, each in built.items() if isinstance(built, OptimWrapperDict) else [('', built)]:
            with each.optim_context(model):
                pass
    except Exception as error:  # the classes named in a config may raise anything
        optimizer = (settings.get('optimizer') or {}).get('type')
        said = f'{type(error).__name__}: {" ".join(str(error).split())[:300]}'
        raise CSGError(f'optim_wrapper (optimizer {optimizer}): {said}; correct it in the config') from None
    finally:
        logger.setLevel(level)


def _build_dataset(split: str, dataset: Mapping[str, Any], remedy: str) -> BaseDataset:
    try:
        return DATASETS.build({**dataset, 'pipeline': [], 'lazy_init': False, 'serialize_data': False})
    except CSGError as error:
        raise CSGError(f'{split} data: {error}') from None
    except (AssertionError, OSError, RuntimeError, ValueError) as error:  # raised by the libraries' data sets
        raise CSGError(f'{split} data: {" ".join(str(error).split())}; {remedy}') from None


def _check_samples(split: str, root: Path, dataset: BaseDataset, remedy: str) -> None:
    if len(dataset) == 0:
        raise CSGError(f'{split} data: {root} contains no sample; {remedy}')
    # Without a list, the images are the files found in the folder, so they exist.
    keys = ('img_path', 'seg_map_path') if dataset.ann_file else ('seg_map_path',)
    paths = [Path(sample[key]) for sample in dataset.data_list for key in keys if sample.get(key)]
    missing = [path for path in paths if not path.exists()]
    if missing:
        raise CSGError(
            f'{split} data: {len(missing)} of {len(paths)} files are missing, the first {missing[0]}; {remedy}'
        )


def _check_classes(split: str, model: Mapping[str, Any], dataset: BaseDataset) -> None:
    name = 'head' if 'head' in model else 'decode_head'
    head = model.get(name)
    head = head[-1] if isinstance(head, (list, tuple)) else head
    wanted, found = (head or {}).get('num_classes'), dataset.metainfo.get('classes')
    if wanted is not None and found is not None and wanted != len(found):
        raise CSGError(
            f'{split} data: {type(dataset).__name__} has {len(found)} classes, model.{name}.num_classes is {wanted}; '
            'make them the same'
        )
