"""CSGModel and TaughtModel, the model types that retrofit a network or give it a teacher; models from configs."""

import inspect
from collections.abc import Mapping, Sequence
from copy import deepcopy
from functools import partial
from typing import Any, cast

from mmengine.config import Config
from mmengine.dist import broadcast
from mmengine.logging import print_log
from mmengine.model import BaseAveragedModel, BaseTTAModel, is_model_wrapper
from mmengine.registry import HOOKS, MODELS, init_default_scope
from torch import Tensor, nn

from csg_seg.errors import CSGError, abridge
from csg_seg.generators.settings import read_patterns
from csg_seg.layers.bank import GeneratorBank, bank_of, find_bank, inner_root
from csg_seg.layers.conv import find_convs
from csg_seg.layers.state_dict_checks import check_reset
from csg_seg.mm.checkpoints.reading import read_checkpoint
from csg_seg.mm.config_parts import config_hooks
from csg_seg.retrofitting import freezing
from csg_seg.retrofitting.surgery import CSG, retrofit

from .teacher import ConfiguredTeacher


@MODELS.register_module()
def CSGModel(
    csg: CSG | None = None,
    base_type: str | None = None,
    teacher: Mapping[str, Any] | None = None,
    generators_from: str | None = None,
    reset: str | Sequence[str] | None = None,
    keep_weights: bool = True,
    train_only: str | Sequence[str] | None = None,
    **base: Any,
) -> nn.Module:
    """Build the model of the base config and retrofit it.

    ::

        model = dict(type='CSGModel', base_type={{_base_.model.type}}, csg=dict(...))

    Args:
        csg: one dict of generator settings, or a list of them.
        base_type: registered name of the model to build.
        teacher: arguments of :class:`csg_seg.mm.teacher.ConfiguredTeacher`. Without a ``model``, the teacher
            is the network before the retrofit, and the model starts from the teacher's
            weights unless the config has an ``init_cfg``.
        generators_from: checkpoint of a CSG network of any architecture. Training starts
            with its generators.
        reset: patterns for layers that keep their start values if the checkpoint that
            training starts from does not fit them, such as a head for other classes.
        keep_weights: as for :func:`csg_seg.load_compact`; False saves memory in evaluation.
        train_only: patterns of parameter names, as for :func:`csg_seg.train_only`; all others are frozen.
        base: arguments of ``base_type``.

    Returns:
        A model of type ``base_type``. Its state dict holds codes and generators.

    Raises:
        CSGError: a setting is wrong or fits no layer.
    """
    if csg is None or base_type is None:
        raise CSGError('CSGModel needs csg, such as csg=dict(ratio=4), and base_type={{_base_.model.type}}')
    if base_type == 'CSGModel':
        raise CSGError('CSGModel: the base config is already a CSG config; override only model.csg')
    if teacher is not None and not isinstance(teacher, Mapping):
        raise CSGError(f'teacher must be a dict with checkpoint; got {teacher!r}')
    if teacher is not None and teacher.get('model') is None and not base.get('init_cfg'):
        base = _start_from(base, teacher)
    # Segmentors write into their config.
    architecture = deepcopy(dict(type=base_type, **base))
    model = retrofit_for_runner(MODELS.build(dict(type=base_type, **base)), csg, generators_from, reset)
    bank_of(model).keep_weights = keep_weights
    if train_only is not None:
        freezing.train_only(model, train_only)
    return model if teacher is None else _teach(model, {**teacher, 'model': teacher.get('model') or architecture})


@MODELS.register_module()
def TaughtModel(base_type: str | None = None, teacher: Mapping[str, Any] | None = None, **base: Any) -> nn.Module:
    """Build a dense model and give it a teacher, for example to compare a narrower network with a generated one.

    Args:
        base_type: registered name of the model to build.
        teacher: arguments of :class:`csg_seg.mm.teacher.ConfiguredTeacher`, including ``model``.
        base: arguments of ``base_type``.

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
    """Retrofit a model in place so that all ranks get the same fit when a Runner loads dense weights.

    The arguments are those of :func:`CSGModel`.

    Raises:
        CSGError: a setting is wrong or fits no layer, or a part of the model averages other layers by name.
    """
    for name, module in model.named_modules():
        if isinstance(module, BaseAveragedModel) and find_convs(module):
            raise CSGError(
                f'{name}: a {type(module).__name__} averages the weights of other layers by name, and generated '
                'layers have no weights; train this model dense, and retrofit the trained model'
            )
    built_with = _weights_built_with(model)
    bank = bank_of(retrofit(model, csg))
    bank.loading.built_with = {name: built_with[name].detach() for name in bank.layers if name in built_with}
    if generators_from is not None:
        # Read when training begins, because tests do not need the file.
        bank.loading.before_init = partial(_load_generators, path=generators_from)
    bank.loading.after_fit = _share_and_log_fit
    bank.reset.patterns = read_patterns('CSG', 'reset', reset) or ()
    bank.reset.on_reset = _log_reset
    check_reset(model, bank.reset.patterns)
    return model


def bare_model(model: nn.Module) -> nn.Module:
    """Return the network inside wrappers for data parallelism and test-time augmentation."""
    while is_model_wrapper(model) or isinstance(model, BaseTTAModel):
        model = cast(nn.Module, model.module)
    return model


def build_model(cfg: Config) -> nn.Module:
    """Build the model of a config without trained weights; a ``CSGHook`` in the config retrofits it.

    Raises:
        CSGError: a setting is wrong or fits no layer, or a part of the model is a ``CSGModel``.
    """
    if 'csg' in cfg.model and cfg.model.type != 'CSGModel':
        raise CSGError(f"the model has csg settings but its type is {cfg.model.type}; give it type='CSGModel'")
    init_default_scope(cfg.get('default_scope', 'mmseg'))
    # Segmentors write into their config, which may be built again.
    model = MODELS.build(deepcopy(cfg.model))
    for hook in config_hooks(cfg):
        if hook.get('type') == 'CSGHook':
            HOOKS.build(hook).retrofit(model, cfg.model)
    part = None if find_bank(model) else inner_root(model)
    if part is not None:
        raise CSGError(
            f'model.{part} is a CSGModel, and only the model as a whole can be one; to compress this part alone, set '
            f"csg=dict(..., include=['{part}']) of the whole model"
        )
    return model


def share_fit(bank: GeneratorBank) -> None:
    """Send the first rank's fit to all ranks; other machines' libraries may round differently."""
    for tensor in [*bank.parameters(), *(each for conv in bank.layers.values() for each in conv.stored().values())]:
        broadcast(tensor.data)


def _weights_built_with(model: nn.Module) -> dict[str, Tensor]:
    """Return, by layer, the conv weights of parts that mmengine will not initialise, because they are marked as done.

    A backbone that loads trained weights when it is built marks itself, such as ``TIMMBackbone``. A model that is
    marked as a whole has been initialised before the retrofit, and gives none.
    """
    if getattr(model, '_is_init', False):
        return {}
    parts = [f'{name}.' for name, module in model.named_modules() if getattr(module, '_is_init', False)]
    return {name: conv.weight for name, conv in find_convs(model).items() if f'{name}.'.startswith(tuple(parts))}


def _start_from(base: dict[str, Any], teacher: Mapping[str, Any]) -> dict[str, Any]:
    """Initialise a model from its teacher's weights, which replace those of ``pretrained``."""
    start: dict[str, Any] = {'init_cfg': dict(type='Pretrained', checkpoint=teacher.get('checkpoint'))}
    if 'pretrained' in base:
        start['pretrained'] = None
    return {**base, **start}


def _teach(model: nn.Module, teacher: Mapping[str, Any]) -> nn.Module:
    if 'anneal' in teacher:
        raise CSGError(
            "teacher: unknown key 'anneal'; it was removed in 0.3.0 because it did not improve accuracy: delete the key"
        )
    try:
        return ConfiguredTeacher(**teacher).attach(model)
    except TypeError as error:
        keys = ', '.join(inspect.signature(ConfiguredTeacher).parameters)
        said = str(error).removeprefix('ConfiguredTeacher.__init__() ')
        raise CSGError(f'teacher: {said}; its keys are {keys}') from None


def _load_generators(bank: GeneratorBank, path: str) -> None:
    try:
        bank.loading.load_generators(read_checkpoint(path)['state_dict'])
    except CSGError as error:
        raise CSGError(f'generators_from: {path}: {str(error).removeprefix(f"{path}: ")}') from None
    print_log(f'CSG: loaded the generators of {path}', logger='current')


def _log_reset(layers: Sequence[str]) -> None:
    print_log(f'CSG: the checkpoint does not fit {abridge(layers, most=8)}, reset to start values', logger='current')


def _share_and_log_fit(bank: GeneratorBank) -> None:
    share_fit(bank)
    errors = bank.loading.errors.values()
    mean = sum(errors) / len(errors)
    print_log(f'CSG: fitted {len(errors)} layers to dense weights, mean relative error {mean:.3f}', logger='current')
