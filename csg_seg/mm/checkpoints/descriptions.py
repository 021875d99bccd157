"""Describe a registered network as JSON in a compact checkpoint, and build it from there.

A description is not trusted. mmengine's registries import whatever an unknown type names,
and configs may name files and addresses of weights; both are refused here.
"""

from collections.abc import Iterator, Mapping
from copy import deepcopy
from typing import Any

from mmengine.config import Config
from mmengine.registry import MODELS, TRANSFORMS, Registry, init_default_scope
from torch import nn

from csg_seg.errors import CSGError
from csg_seg.mm.config_parts import test_pipeline
from csg_seg.storage.builders import check_source, register_builder

SCOPES = ('mmengine', 'mmcv', 'mmseg', 'mmpretrain')
# Config keys that name the weights to start from; a compact checkpoint holds weights itself.
WEIGHTS = ('init_cfg', 'pretrained')


def describe(cfg: Config) -> dict[str, Any]:
    """Describe how to build the dense network of a config, for :func:`csg_seg.save_compact`.

    Args:
        cfg: dense or CSG config of mmseg or mmpretrain.

    Raises:
        CSGError: the config holds values that JSON cannot hold, or names files.
    """
    model = dense_model(cfg)
    if cfg.get('data_preprocessor') and 'data_preprocessor' not in model:  # as a Runner does
        model['data_preprocessor'] = cfg.data_preprocessor.to_dict()
    scope, model = cfg.get('default_scope', 'mmseg'), without_weights(model)
    source: dict[str, Any] = dict(builder='mmengine', scope=scope, model=model)
    pipeline = test_pipeline(cfg)
    if pipeline:
        source['test_pipeline'] = [dict(each) for each in pipeline]
    check_source(source)
    _check_all(scope, model, source.get('test_pipeline'))
    return source


def dense_model(cfg: Config) -> dict[str, Any]:
    """Return the ``model`` of a config without the settings of ``CSGModel`` or ``TaughtModel``."""
    if 'model' not in cfg:
        raise CSGError('the config has no model, as where a Runner is given the network itself')
    model = cfg.model.to_dict()
    if model['type'] in ('CSGModel', 'TaughtModel'):
        model['type'] = model.pop('base_type')
        for key in ('csg', 'teacher', 'generators_from', 'reset', 'keep_weights', 'train_only'):
            model.pop(key, None)
    return model


@register_builder('mmengine')
def build_mmengine(*, scope: str, model: Mapping[str, Any], test_pipeline: list | None = None) -> nn.Module:
    """Build a registered network and set its attribute ``cfg``, which mmseg's inference needs.

    Args:
        scope: 'mmseg' or 'mmpretrain'.
        model: the ``model`` of a config.
        test_pipeline: of the same config, for inference.

    Raises:
        CSGError: a type is not registered, or a value may name a file or an address.
    """
    _check_all(scope, model, test_pipeline)
    cfg = Config(dict(model=without_weights(model), default_scope=scope, test_pipeline=test_pipeline or []))
    init_default_scope(scope)
    network = MODELS.build(deepcopy(cfg.model))
    network.cfg = cfg
    return network


def without_weights(value: Any) -> Any:
    """Return a config without the keys that name weights to start from."""
    if isinstance(value, Mapping):
        return {key: without_weights(each) for key, each in value.items() if key not in WEIGHTS}
    return type(value)(without_weights(each) for each in value) if type(value) in (list, tuple) else value


def _check_all(scope: str, model: Any, test_pipeline: Any) -> None:
    if scope not in SCOPES:
        raise CSGError(f'there is no scope {str(scope)[:40]!r}, only {", ".join(SCOPES)}')
    init_default_scope(scope)
    _check(scope, model, MODELS)
    _check(scope, test_pipeline, TRANSFORMS)


def _check(scope: str, value: Any, registry: Registry) -> None:
    """Refuse types that are not registered, and text that may name a file or an address."""
    for key, each in leaves(value):
        if key == 'type' and not _is_registered(scope, each, registry):
            raise CSGError(f'type {str(each)[:60]!r} is not registered in {scope}; import what registers it first')
        if isinstance(each, str) and ('/' in each or '\\' in each):
            raise CSGError(f'{key}={each[:60]!r} may name a file or an address; compact files cannot contain them')


def leaves(value: Any, key: str = '') -> Iterator[tuple[str, Any]]:
    """Yield each value that is no container, after the key that it, or the list around it, has."""
    if isinstance(value, Mapping):
        for name, each in value.items():
            yield from leaves(each, str(name))
    elif isinstance(value, (list, tuple)):
        for each in value:
            yield from leaves(each, key)
    else:
        yield key, value


def _is_registered(scope: str, name: Any, registry: Registry) -> bool:
    if not isinstance(name, str):
        return False
    first, _, rest = name.rpartition('.')
    if first and first not in SCOPES:
        return False
    found = [registry, *(child for owner, child in registry.children.items() if owner in SCOPES)]
    for each in found:
        each.import_from_location()
    return any(rest in each.module_dict for each in found)
