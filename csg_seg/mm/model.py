"""The model door: any registered model, retrofitted as it is built."""

from copy import deepcopy
from typing import Any

from mmengine.config import Config
from mmengine.registry import HOOKS, MODELS, init_default_scope
from torch import nn

from ..errors import CSGError
from ..retrofit import CSG, retrofit


@MODELS.register_module()
def CSGModel(csg: CSG | None = None, base_type: str | None = None, **base: Any) -> nn.Module:
    """Build the model that a config inherited and retrofit it.

    ::

        model = dict(type='CSGModel', base_type={{_base_.model.type}}, csg=dict(...))

    Args:
        csg: one dict of generator settings, or a list of them.
        base_type: registered name of the model to build.
        base: all that ``base_type`` takes.

    Returns:
        A real ``base_type``, whose state dict holds codes and generators.

    Raises:
        CSGError: a setting is wrong or fits no layer.
    """
    if csg is None or base_type is None:
        raise CSGError('CSGModel needs csg=dict(...) and base_type={{_base_.model.type}}; see README.md')
    if base_type == 'CSGModel':
        raise CSGError('CSGModel: the base config is a CSG config already; override model.csg alone')
    return retrofit(MODELS.build(dict(type=base_type, **base)), csg)


def build_model(cfg: Config) -> nn.Module:
    """Build the model of a config through whichever door it uses, without trained weights."""
    if 'csg' in cfg.model and cfg.model.type != 'CSGModel':
        raise CSGError(f"the model has csg settings but its type is {cfg.model.type}; give it type='CSGModel'")
    init_default_scope(cfg.get('default_scope', 'mmseg'))
    # Segmentors write into their config, which must stay fit to be built again.
    model = MODELS.build(deepcopy(cfg.model))
    hooks = [*cfg.get('default_hooks', {}).values(), *cfg.get('custom_hooks', [])]
    for hook in hooks:
        if hook and hook.get('type') == 'CSGHook':
            HOOKS.build(hook).retrofit(model)
    return model
