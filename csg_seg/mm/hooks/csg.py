"""The hook that retrofits a model."""

import gc
from collections.abc import Mapping, Sequence
from copy import deepcopy

from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper
from mmengine.optim import OptimWrapper, OptimWrapperDict
from mmengine.registry import HOOKS
from mmengine.runner import Runner, find_latest_checkpoint
from torch import nn

from csg_seg.errors import CSGError
from csg_seg.generators.settings import Settings
from csg_seg.layers.bank import GeneratorBank, find_bank
from csg_seg.mm.model import bare_model, retrofit_for_runner
from csg_seg.mm.patches import GENERATOR
from csg_seg.report import summarise
from csg_seg.retrofitting.surgery import CSG

from .checkpoint_guard import prepare_resume
from .compact_checkpoint import CompactCheckpointHook


@HOOKS.register_module()
class CSGHook(Hook):
    """Retrofit a model that the config left dense, and log what that saves.

    Put it into ``default_hooks``, which merges with the base config's. On a model
    that is retrofitted already it only reports. It reaches training and testing
    by a ``Runner``, but not ``init_model``, which runs no hooks.

    Args:
        csg: one dict of generator settings, or a list of them; None when the
            model is a ``CSGModel``.
        save_compact: write a compact checkpoint beside each checkpoint.
        generators_from: as for ``CSGModel``, when there is ``csg``.
        reset: likewise.
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
                raise CSGError(f'CSGHook: {key} goes with csg; of a CSGModel, give it to the model')
        self.csg = csg
        self.generators_from = generators_from
        self.reset = reset
        self.save_compact = save_compact

    def retrofit(self, model: nn.Module) -> bool:
        """Retrofit a bare model; False when it is retrofitted already.

        Raises:
            CSGError: the model is dense and there are no settings, or they do not
                fit; or it is retrofitted by others.
        """
        bank = find_bank(model)
        if bank is not None:
            _check_same_settings(self.csg, bank)
            return False
        if self.csg is None:
            raise CSGError('CSGHook found a dense model and has no csg; give it csg=dict(...), or build a CSGModel')
        retrofit_for_runner(model, self.csg, self.generators_from, self.reset)
        return True

    def before_train(self, runner: Runner) -> None:
        """Let weights be fitted again that are loaded later."""
        find_bank(bare_model(runner.model)).fit_on_load = True

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Refuse to resume from a dense checkpoint, which mmengine does when ``load_from`` names one."""
        prepare_resume(runner, checkpoint)
        if runner._resume and not any(GENERATOR.search(name) for name in checkpoint.get('state_dict', checkpoint)):
            raise CSGError(
                'the run would resume from a dense checkpoint, the load_from of the config; resume with '
                'load_from=None, or start without --resume'
            )

    def before_run(self, runner: Runner) -> None:
        """Retrofit before weights are initialised or loaded."""
        model = bare_model(runner.model)
        if self.retrofit(model):
            _rewrap(runner)
        if runner._resume and (runner._load_from or find_latest_checkpoint(runner.work_dir)):
            find_bank(model).fit_on_load = False
        runner.logger.info(f'CSG: {summarise(model).headline()}')
        if self.save_compact and not any(isinstance(hook, CompactCheckpointHook) for hook in runner.hooks):
            runner.register_hook(CompactCheckpointHook())


def _check_same_settings(csg: CSG | None, bank: GeneratorBank) -> None:
    if csg is None:
        return
    dicts = [csg] if isinstance(csg, Mapping) else csg
    settings = [Settings.from_dict(each, position=position) for position, each in enumerate(dicts)]
    if settings != [generator.settings for generator in bank]:
        raise CSGError('the csg of CSGHook is not the one the model is retrofitted with; drop one of the two')


def _rewrap(runner: Runner) -> None:
    """Make the runner's wrapper and, in training, its optimizer anew for changed parameters."""
    if is_model_wrapper(runner.model):
        runner.model = runner.model.module
        # The old wrapper's gradient hooks go when it is collected, not before.
        gc.collect()
        runner.model = runner.wrap_model(deepcopy(runner.cfg.get('model_wrapper_cfg')), runner.model)
    if not isinstance(runner.optim_wrapper, (OptimWrapper, OptimWrapperDict)):
        return
    optim_wrapper = runner.cfg.get('optim_wrapper')
    if optim_wrapper is None:
        raise CSGError(
            'CSGHook cannot rebuild an optimizer that no config describes; use CSGModel, or csg_seg.retrofit'
        )
    runner.optim_wrapper = runner.build_optim_wrapper(deepcopy(optim_wrapper))
    built, runner.param_schedulers = runner.param_schedulers, None
    runner.scale_lr(runner.optim_wrapper, runner.auto_scale_lr)
    if built is not None:
        runner.param_schedulers = runner.build_param_scheduler(deepcopy(runner.cfg.param_scheduler))
