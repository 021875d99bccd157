"""CSGHook: retrofit the model of a Runner."""

import gc
from collections.abc import Mapping, Sequence
from copy import deepcopy
from typing import Any

from mmengine.hooks import EMAHook, Hook
from mmengine.model import is_model_wrapper
from mmengine.optim import OptimWrapper, OptimWrapperDict
from mmengine.registry import HOOKS
from mmengine.runner import Runner, find_latest_checkpoint
from torch import nn

from csg_seg.errors import CSGError, abridge
from csg_seg.generators.settings import Settings
from csg_seg.layers.bank import GeneratorBank, bank_of, find_bank
from csg_seg.mm.model import bare_model, retrofit_for_runner
from csg_seg.report import summarise
from csg_seg.retrofitting.automatic import is_automatic
from csg_seg.retrofitting.surgery import CSG

from .checkpoint_guard import prepare_resume
from .compact_checkpoint import CompactCheckpointHook


@HOOKS.register_module()
class CSGHook(Hook):
    """Retrofit a dense model before training or testing, and log its compression ratio.

    Put it into ``default_hooks``, which are merged with those of the base config. It only
    logs if the model is a ``CSGModel``. A Runner runs it; ``init_model`` runs no hooks.

    Args:
        csg: one dict of generator settings, or a list of them. None if the model is a ``CSGModel``.
        save_compact: write a compact checkpoint beside each checkpoint.
        generators_from: as for ``CSGModel``; needs ``csg``.
        reset: as for ``CSGModel``; needs ``csg``.
    """

    # Before hooks that copy or inspect the model, such as EMAHook.
    priority = 'VERY_HIGH'

    def __init__(
        self,
        csg: CSG | None = None,
        save_compact: bool = False,
        generators_from: str | None = None,
        reset: str | Sequence[str] | None = None,
    ):
        for key, value in (('generators_from', generators_from), ('reset', reset)):
            if csg is None and value is not None:
                raise CSGError(f'CSGHook: {key} goes with csg; if the model is a CSGModel, set it there')
        self.csg = csg
        self.generators_from = generators_from
        self.reset = reset
        self.save_compact = save_compact

    def retrofit(self, model: nn.Module, built_from: Mapping[str, Any] | None = None) -> bool:
        """Retrofit a model that is not wrapped, and return whether it was dense.

        Args:
            model: dense or retrofitted.
            built_from: the config of the model.

        Raises:
            CSGError: the model is dense and the hook has no settings, a setting fits no layer, or the model was
                retrofitted with other settings.
        """
        bank = find_bank(model)
        if bank is not None:
            _check_same_settings(self.csg, bank, built_from or {})
            return False
        if self.csg is None:
            raise CSGError('CSGHook found a dense model and has no csg; give it csg=dict(...), or build a CSGModel')
        retrofit_for_runner(model, self.csg, self.generators_from, self.reset)
        return True

    def before_train(self, runner: Runner) -> None:
        """Fit dense weights that are loaded from now on, also in a run that was resumed, and reset no more layers."""
        bank = bank_of(bare_model(runner.model))
        bank.loading.fit_on_load, bank.reset.is_on = True, False

    def before_test(self, runner: Runner) -> None:
        """Refuse to score layers that the checkpoint did not fit, as a FlexibleRunner would do with ``reset``."""
        reset = bank_of(bare_model(runner.model)).reset
        if reset.is_on and reset.layers:
            raise CSGError(f'the checkpoint does not fit {abridge(reset.layers)}; test one of this network')

    before_val = before_test

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Prepare a run that resumes, or refuse it."""
        prepare_resume(runner, checkpoint)

    def before_run(self, runner: Runner) -> None:
        """Retrofit before weights are initialised or loaded."""
        model = bare_model(runner.model)
        if find_bank(model) is None:
            _check_order(runner)
        if self.retrofit(model, runner.cfg.get('model')):
            _rewrap(runner)
        if runner._resume and (runner._load_from or find_latest_checkpoint(runner.work_dir)):
            bank_of(model).loading.fit_on_load = False
        log_size(runner)
        if self.save_compact and not any(isinstance(hook, CompactCheckpointHook) for hook in runner.hooks):
            runner.register_hook(CompactCheckpointHook())


def _check_order(runner: Runner) -> None:
    """Refuse a run in which something has used the dense model before the retrofit."""
    if not isinstance(runner, Runner):
        kind = type(runner).__name__
        raise CSGError(f'CSGHook: a {kind} loads weights before hooks run; build a CSGModel instead')
    if any(isinstance(hook, EMAHook) and hasattr(hook, 'ema_model') for hook in runner.hooks):
        raise CSGError('EMAHook has copied the dense model before CSGHook; leave out its priority, or build a CSGModel')


def log_size(runner: Runner) -> None:
    """Log how much smaller a Runner's model is than the dense one."""
    runner.logger.info(f'CSG: {summarise(bare_model(runner.model)).headline()}')


def _check_same_settings(csg: CSG | None, bank: GeneratorBank, built_from: Mapping[str, Any]) -> None:
    if csg is None:
        return
    if isinstance(csg, str) or is_automatic(csg):  # what was found cannot be compared
        given = built_from.get('csg', csg)
        if given != csg:
            raise CSGError(f'CSGHook has csg={csg!r}, and the model is a CSGModel of csg={given!r}; drop one')
        return
    dicts = [csg] if isinstance(csg, Mapping) else csg
    settings = [Settings.from_dict(each, position=position) for position, each in enumerate(dicts)]
    if settings != [generator.settings for generator in bank]:
        raise CSGError('the csg of CSGHook is not the one that the model was retrofitted with; drop one of the two')


def _rewrap(runner: Runner) -> None:
    """Build the runner's wrapper again and, in training, its optimizer, because the parameters have changed."""
    if is_model_wrapper(runner.model):
        runner.model = runner.model.module
        # The old wrapper's gradient hooks are removed only when it is collected.
        gc.collect()
        runner.model = runner.wrap_model(deepcopy(runner.cfg.get('model_wrapper_cfg')), runner.model)
    if not isinstance(runner.optim_wrapper, (OptimWrapper, OptimWrapperDict)):
        return
    optim_wrapper = runner.cfg.get('optim_wrapper')
    if optim_wrapper is None:
        raise CSGError(
            'CSGHook cannot rebuild an optimizer that is not in the config; use CSGModel, or csg_seg.retrofit'
        )
    runner.optim_wrapper = runner.build_optim_wrapper(deepcopy(optim_wrapper))
    built, runner.param_schedulers = runner.param_schedulers, None
    runner.scale_lr(runner.optim_wrapper, runner.auto_scale_lr)
    if built is not None:
        runner.param_schedulers = runner.build_param_scheduler(deepcopy(runner.cfg.param_scheduler))
