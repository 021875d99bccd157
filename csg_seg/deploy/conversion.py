"""Convert a checkpoint released by others into a checkpoint and a config of this project."""

import os
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

from mmengine.config import Config
from torch import Tensor

from csg_seg.errors import CSGError
from csg_seg.generators.settings import Settings
from csg_seg.mm.checkpoints.reading import load_weights
from csg_seg.mm.checkpoints.unpickling import check_file, read_tensors
from csg_seg.mm.model import build_model
from csg_seg.report import Summary, summarise
from csg_seg.retrofitting.selection import choose_layers
from csg_seg.storage.released import Released, read_released


@dataclass(frozen=True)
class Converted:
    """A released checkpoint with its config, its state dict in this project's names, and a summary."""

    released: Released
    config: Config
    state_dict: dict[str, Tensor]
    summary: Summary


def convert_released(path: str | os.PathLike, like: Config) -> Converted:
    """Convert a released checkpoint, without unpickling objects.

    Args:
        path: the released file.
        like: config of an image classifier. The new config takes its data and schedule.

    Raises:
        FileNotFoundError: there is no such file.
        CSGError: the file is damaged, its network is unknown, or ``like`` does not fit it.
    """
    check_file(path)
    try:
        released = read_released(read_tensors(path))
        config = _make_config(released, like)
        model = build_model(config)
        settings = {name: state for name, state in model.state_dict().items() if name.endswith('_extra_state')}
        load_weights(model, settings | released.tensors)
    except CSGError as error:
        raise CSGError(str(error) if str(error).startswith(str(path)) else f'{path}: {error}') from None
    return Converted(released, config, model.state_dict(), summarise(model))


def _make_config(released: Released, like: Config) -> Config:
    """Return the config of a released network, without base configs."""
    if like.model.get('head', {}).get('type') != 'LinearClsHead' or 'neck' not in like.model:
        raise CSGError('the config given as --like has no neck or no LinearClsHead; use one of configs/cifar10')
    if like.model.head.num_classes != released.classes:
        raise CSGError(
            f'the network has {released.classes} classes, and the config given as --like has '
            f'{like.model.head.num_classes}; use one with as many classes'
        )
    cfg = deepcopy(like)
    cfg.default_hooks.pop('csg', None)
    head = dict(cfg.model.head, num_classes=released.classes, in_channels=released.features)
    model: dict[str, Any] = dict(type='ImageClassifier', backbone=released.backbone, neck=cfg.model.neck, head=head)
    if released.csg:
        chosen, _ = choose_layers(
            build_model(Config(dict(model=model, default_scope='mmpretrain'))),
            [Settings.from_dict(released.csg, position=0)],
        )
        is_default = set(chosen) == set(released.generated)
        csg = released.csg if is_default else released.csg | {'include': list(released.generated)}
        model.update(type='CSGModel', base_type='ImageClassifier', csg=csg)
        cfg.default_hooks.csg = dict(type='CSGHook', save_compact=True)
    cfg.model = model
    cfg.data_preprocessor.update(num_classes=released.classes, **(released.normalisation or {}))
    cfg.custom_imports = dict(imports=['csg_seg.mm'])
    return cfg
