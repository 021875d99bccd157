"""Turn a released checkpoint into one of this project, with the config that goes with it."""

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
    """A released checkpoint, its config, and the counts of the network."""

    released: Released
    config: Config
    state_dict: dict[str, Tensor]
    summary: Summary


def convert_released(path: str | os.PathLike, like: Config) -> Converted:
    """Read a released file, unpickling nothing but tensors.

    Args:
        path: the file.
        like: config of an image classifier, whose data and schedule the new config takes.

    Raises:
        FileNotFoundError: there is no such file.
        CSGError: the file is damaged, or its network is not known.
    """
    check_file(path)
    try:
        released = read_released(read_tensors(path))
        config = write_config(released, like)
        model = build_model(config)
        settings = {name: state for name, state in model.state_dict().items() if name.endswith('_extra_state')}
        load_weights(model, settings | released.tensors)
    except CSGError as error:
        raise CSGError(str(error) if str(error).startswith(str(path)) else f'{path}: {error}') from None
    return Converted(released, config, model.state_dict(), summarise(model))


def write_config(released: Released, like: Config) -> Config:
    """Return the config of a released network, whole and without bases."""
    if like.model.get('head', {}).get('type') != 'LinearClsHead' or 'neck' not in like.model:
        raise CSGError('the config to be like has no neck and LinearClsHead; give one of configs/cifar10')
    if like.model.head.num_classes != released.classes:
        raise CSGError(
            f'{released.classes} classes, and the config to be like has {like.model.head.num_classes}; '
            'give one of as many classes'
        )
    cfg = deepcopy(like)
    cfg.default_hooks.pop('csg', None)
    head = dict(cfg.model.head, num_classes=released.classes, in_channels=released.features)
    model: dict[str, Any] = dict(type='ImageClassifier', backbone=released.backbone, neck=cfg.model.neck, head=head)
    if released.csg:
        csg = released.csg | _include(released, Config(dict(model=model, default_scope='mmpretrain')))
        model.update(type='CSGModel', base_type='ImageClassifier', csg=csg)
        cfg.default_hooks.csg = dict(type='CSGHook', save_compact=True)
    cfg.model = model
    cfg.data_preprocessor.update(num_classes=released.classes, **(released.normalisation or {}))
    cfg.custom_imports = dict(imports=['csg_seg.mm'])
    return cfg


def _include(released: Released, dense: Config) -> dict[str, list[str]]:
    """Return an ``include`` if the default choice of layers is not the released one."""
    settings = Settings.from_dict(released.csg, position=0)
    chosen, _ = choose_layers(build_model(dense), [settings])
    return {} if set(chosen) == set(released.generated) else {'include': list(released.generated)}
