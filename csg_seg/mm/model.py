"""The model doors: any registered model, retrofitted or taught as it is built."""

import inspect
from collections.abc import Mapping, Sequence
from copy import deepcopy
from functools import partial
from typing import Any

from mmengine.config import Config
from mmengine.dist import broadcast
from mmengine.logging import print_log
from mmengine.model import BaseAveragedModel, BaseTTAModel, is_model_wrapper
from mmengine.registry import HOOKS, MODELS, init_default_scope
from torch import nn

from csg_seg.errors import CSGError, abridge
from csg_seg.generators.settings import read_patterns
from csg_seg.layers.bank import GeneratorBank, find_bank
from csg_seg.layers.conv import find_convs
from csg_seg.layers.loading import check_reset
from csg_seg.mm.checkpoints.reading import read_checkpoint
from csg_seg.retrofitting.surgery import CSG, retrofit

from .teacher import Teacher


@MODELS.register_module()
def CSGModel(
    csg: CSG | None = None,
    base_type: str | None = None,
    teacher: Mapping[str, Any] | None = None,
    generators_from: str | None = None,
    reset: str | Sequence[str] | None = None,
    **base: Any,
) -> nn.Module:
    """Build the model that a config inherited and retrofit it.

    ::

        model = dict(type='CSGModel', base_type={{_base_.model.type}}, csg=dict(...))

    Args:
        csg: one dict of generator settings, or a list of them.
        base_type: registered name of the model to build.
        teacher: arguments of :class:`csg_seg.mm.teacher.Teacher`, a trained dense
            network of this config; the generated one starts from its weights, unless
            the config has an ``init_cfg`` of its own.
        generators_from: checkpoint of a CSG network of any architecture, whose
            generators training starts with.
        reset: patterns of layers that keep their start values where the checkpoint that
            training begins with does not fit them, such as a head for other classes.
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
    if teacher is not None and not isinstance(teacher, Mapping):
        raise CSGError(f'teacher must be a dict with checkpoint; got {teacher!r}')
    if teacher is not None and teacher.get('model') is None and not base.get('init_cfg'):
        base = _start_from(base, teacher)
    # Segmentors write into their config.
    architecture = deepcopy(dict(type=base_type, **base))
    model = retrofit_for_runner(MODELS.build(dict(type=base_type, **base)), csg, generators_from, reset)
    return model if teacher is None else _teach(model, teacher, architecture)


@MODELS.register_module()
def TaughtModel(base_type: str | None = None, teacher: Mapping[str, Any] | None = None, **base: Any) -> nn.Module:
    """Build a dense model that a larger one teaches, such as a narrower twin to compare a generated one with.

    Args:
        base_type: registered name of the model to build.
        teacher: arguments of :class:`csg_seg.mm.teacher.Teacher`, ``model`` included.
        base: all that ``base_type`` takes.

    Raises:
        CSGError: a setting is wrong.
    """
    if teacher is None or base_type is None or not isinstance(teacher.get('model'), Mapping):
        raise CSGError('TaughtModel needs base_type and teacher=dict(checkpoint=..., model=...)')
    return _teach(MODELS.build(dict(type=base_type, **base)), teacher)


def retrofit_for_runner(
    model: nn.Module,
    csg: CSG,
    generators_from: str | None = None,
    reset: str | Sequence[str] | None = None,
) -> nn.Module:
    """Retrofit a model so that weights which a Runner loads are fitted on all ranks alike.

    Raises:
        CSGError: a setting is wrong or fits no layer, or a part of the model averages others by their names.
    """
    for name, module in model.named_modules():
        if isinstance(module, BaseAveragedModel) and find_convs(module):
            raise CSGError(
                f'{name}: a {type(module).__name__} averages the weights of other layers by their names, which '
                'generated layers do not have; train this model dense, and retrofit what it has trained'
            )
    bank = find_bank(retrofit(model, csg))
    assert bank is not None
    if generators_from is not None:
        # Once training begins: a test or a demonstration needs no such file.
        bank.before_init = partial(_take_over, path=generators_from)
    bank.after_fit = _share_fit_and_tell
    bank.reset.patterns = read_patterns('CSG', 'reset', reset) or ()
    bank.reset.tell = _tell_reset
    check_reset(model, bank.reset.patterns)
    return model


def bare_model(model: nn.Module) -> nn.Module:
    """Return the network inside wrappers for data parallelism and test-time augmentation."""
    while is_model_wrapper(model) or isinstance(model, BaseTTAModel):
        model = model.module
    return model


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


def _start_from(base: dict[str, Any], teacher: Mapping[str, Any]) -> dict[str, Any]:
    """Let a model start from its teacher's weights, which hold all that ``pretrained`` would bring."""
    start: dict[str, Any] = {'init_cfg': dict(type='Pretrained', checkpoint=teacher.get('checkpoint'))}
    if 'pretrained' in base:
        start['pretrained'] = None
    return {**base, **start}


def _teach(model: nn.Module, teacher: Mapping[str, Any], architecture: dict[str, Any] | None = None) -> nn.Module:
    """Attach a teacher, by default of the model's own architecture."""
    try:
        return Teacher(**{'model': architecture, **teacher}).attach(model)
    except TypeError as error:
        keys = ', '.join(inspect.signature(Teacher).parameters)
        said = str(error).removeprefix('Teacher.__init__() ')
        raise CSGError(f'teacher: {said}; its keys are {keys}') from None


def share_fit(bank: GeneratorBank) -> None:
    """Take over the first rank's fit, which another machine's libraries may have rounded otherwise."""
    for tensor in [*bank.parameters(), *(each for conv in bank.layers.values() for each in conv.stored().values())]:
        broadcast(tensor.data)


def _take_over(bank: GeneratorBank, path: str) -> None:
    try:
        bank.load_generators(read_checkpoint(path)['state_dict'])
    except CSGError as error:
        raise CSGError(f'generators_from: {path}: {str(error).removeprefix(f"{path}: ")}') from None
    print_log(f'CSG: generators of {path}', logger='current')


def _tell_reset(layers: Sequence[str]) -> None:
    print_log(f'CSG: the checkpoint does not fit {abridge(layers, most=8)}, reset to start values', logger='current')


def _share_fit_and_tell(bank: GeneratorBank) -> None:
    share_fit(bank)
    errors = bank.fitted.values()
    mean = sum(errors) / len(errors)
    print_log(f'CSG: fitted {len(errors)} layers to dense weights, mean relative error {mean:.3f}', logger='current')
