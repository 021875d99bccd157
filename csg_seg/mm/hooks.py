"""The hook door, compact files beside checkpoints, and resuming with the same random numbers."""

import gc
import sys
from collections.abc import Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.hooks import CheckpointHook, Hook
from mmengine.model import BaseTTAModel, is_model_wrapper
from mmengine.optim import OptimWrapper, OptimWrapperDict
from mmengine.registry import HOOKS
from mmengine.runner import EpochBasedTrainLoop, Runner, find_latest_checkpoint, set_random_seed
from rich.console import Console
from rich.progress import Progress, track
from safetensors import SafetensorError, safe_open
from torch import nn

from ..bank import GeneratorBank, find_bank
from ..errors import CSGError
from ..files import NotWrittenError, writing
from ..report import summarise
from ..retrofit import CSG
from ..settings import Settings
from .checkpoint import GENERATOR, put_generators_first
from .compact import write_described
from .model import retrofit_for_runner

# What a compact file of CompactCheckpointHook calls the checkpoint it lies beside.
OF = 'checkpoint'
# Settings that one kind of torch's optimizers has and another lacks.
KIND = {'momentum', 'betas', 'alpha', 'rho', 'lambd', 'etas', 'lr_decay'}


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
        find_bank(bare_model(runner.model)).fits = True

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
            find_bank(model).fits = False
        runner.logger.info(f'CSG: {summarise(model).headline()}')
        if self.save_compact and not any(isinstance(hook, CompactCheckpointHook) for hook in runner.hooks):
            runner.register_hook(CompactCheckpointHook())


@HOOKS.register_module()
class CompactCheckpointHook(Hook):
    """Write a compact checkpoint (``.safetensors``) beside each checkpoint, and delete it with it.

    One that cannot be written is told of by a warning, and training goes on. Each says
    which checkpoint it is of; by that, a resumed run knows those whose checkpoint mmengine
    deleted just before the run was killed. Copies under other names are left alone, and
    so is every compact file of a run that keeps all its checkpoints.
    """

    # After EMAHook has put the averaged weights into the checkpoint, and CheckpointHook has saved it.
    priority = 'LOWEST'

    def __init__(self) -> None:
        self._checkpoint: dict | None = None
        self._saved: dict[Path, int] = {}

    def before_train(self, runner: Runner) -> None:
        """Note the checkpoints that a resumed run has already, and delete what was left of others."""
        for folder in {Path(runner.work_dir), *(path.parent for path in _announced(runner, ''))}:
            self._saved |= {path: path.stat().st_mtime_ns for path in folder.glob('*.pth')}
            if runner._resume and runner._has_loaded and runner.rank == 0:
                _delete_orphans(runner, folder)

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Remember the weights that are about to be saved."""
        self._checkpoint = checkpoint

    def after_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        """Write the compact file of an iteration's checkpoint."""
        self._write(runner, 'last_ckpt')

    def after_train_epoch(self, runner: Runner) -> None:
        """Write the compact file of an epoch's checkpoint."""
        self._write(runner, 'last_ckpt')

    def after_val_epoch(self, runner: Runner, metrics: dict | None = None) -> None:
        """Write the compact file of the best checkpoint."""
        self._write(runner, 'best_ckpt')

    def _write(self, runner: Runner, which: str) -> None:
        checkpoint, self._checkpoint = self._checkpoint, None
        if checkpoint is None:
            return
        dataset_meta = checkpoint['meta'].get('dataset_meta') or {}
        for path in _announced(runner, which):
            saved = path.stat().st_mtime_ns if path.is_file() else None
            if saved is not None and saved != self._saved.get(path):
                compact = path.with_suffix('.safetensors')
                model, notes = bare_model(runner.model), {OF: path.name}
                try:
                    with writing(compact):
                        write_described(model, checkpoint['state_dict'], compact, runner.cfg, dataset_meta, notes=notes)
                except NotWrittenError as error:
                    runner.logger.warning(f'{error}. Training goes on; tools/compact.py can make it later.')
                    _delete(runner, compact)  # an older one, which would be taken for this checkpoint's
                self._saved[path] = saved
        for path in [path for path in self._saved if not path.exists()]:
            _delete(runner, path.with_suffix('.safetensors'))
            del self._saved[path]


@HOOKS.register_module()
class ExactResumeHook(Hook):
    """Let a resumed run end with the weights of an unbroken one of the same seed.

    mmengine restores the order of the data. This hook adds the random numbers.
    Of an iteration-based run: torch's state, for dropout, goes into checkpoints;
    the data loader's, for augmentation, are drawn anew by loading once more what
    was trained on already, which takes a while. Of an epoch-based run: every epoch
    begins with numbers of its own, drawn from seed and epoch; that reaches
    augmentation as far as it runs in this process (``num_workers=0``).
    Without a fixed ``randomness.seed``, or with different seeds on different
    ranks, exactness is out of reach and it does nothing.
    """

    def __init__(self) -> None:
        self._states: Sequence[torch.Tensor] | None = None

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Store the state of the CPU's and of this process's GPU's generator."""
        cuda = [torch.cuda.get_rng_state()] if torch.cuda.is_available() else []
        checkpoint['random_state'] = [torch.get_rng_state(), *cuda]

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Take the state of a run that is resumed."""
        if runner._resume and self._is_exact(runner):
            self._states = checkpoint.get('random_state')

    def before_train(self, runner: Runner) -> None:
        """Bring the data loader's workers to where they were."""
        loop = runner.train_loop
        if isinstance(loop, EpochBasedTrainLoop):
            return
        # Older mmengine has no such attribute and always loads the data again itself.
        if runner.iter == 0 or getattr(loop, 'fast_forward_on_resume', True) or not self._is_exact(runner):
            return
        runner.logger.info(
            f'Exact resume: loading {runner.iter} batches again for their random numbers; mmengine need not advance.'
        )
        for _ in track(range(runner.iter), 'Loading again', console=Console(stderr=True), disable=runner.rank != 0):
            next(loop.dataloader_iterator)
        loop.fast_forward_on_resume = True

    def before_train_epoch(self, runner: Runner) -> None:
        """Begin an epoch with random numbers of its own."""
        if isinstance(runner.train_loop, EpochBasedTrainLoop) and self._is_exact(runner):
            self._states = None
            # Hashed together, so that no epoch of one seed is an epoch of another.
            mixed = np.random.SeedSequence([runner.cfg.randomness.seed, runner.epoch]).generate_state(1)[0]
            set_random_seed(int(mixed))

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None) -> None:
        """Restore torch's state once the data loader has caught up."""
        if self._states is None:
            return
        cpu, *cuda = (state.cpu() for state in self._states)
        torch.set_rng_state(cpu)
        if cuda and torch.cuda.is_available():
            torch.cuda.set_rng_state(cuda[0])
        self._states = None

    @staticmethod
    def _is_exact(runner: Runner) -> bool:
        randomness = runner.cfg.get('randomness') or {}
        return randomness.get('seed') is not None and not randomness.get('diff_rank_seed', False)


@HOOKS.register_module()
class ChannelsLastHook(Hook):
    """Compute in channels-last memory format, which is faster for convs on most devices."""

    priority = 'VERY_LOW'

    def before_run(self, runner: Runner) -> None:
        """Convert the weights, and from now on every batch of images before the backbone."""
        model = bare_model(runner.model)
        model.to(memory_format=torch.channels_last)
        model.backbone.register_forward_pre_hook(_to_channels_last)


class CheckpointGuardHook(Hook):
    """Refuse to resume from another training's state."""

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Compare the checkpoint's training state with the optimizer."""
        prepare_resume(runner, checkpoint)
        if not runner._resume or not isinstance(runner.optim_wrapper, (OptimWrapper, OptimWrapperDict)):
            return
        path = runner._load_from or find_latest_checkpoint(runner.work_dir)
        anew = f'begin a new run with its weights: --cfg-options load_from={path}, without --resume'
        if not {'epoch', 'iter'} <= {*checkpoint.get('meta', {})} or 'message_hub' not in checkpoint:
            raise CSGError(f'{path} holds weights and no training state to resume; {anew}')
        if 'optimizer' in checkpoint:
            other = _other_optimizer(runner.optim_wrapper, checkpoint['optimizer'])
            if other:
                raise CSGError(f'{path} was saved by {other}; resume with the settings it was trained with, or {anew}')


class ProgressBarHook(Hook):
    """Show how far training, validation or test is, on a terminal's stderr.

    A context manager: enter it before the runner sets up its log, which then
    appears above the bars, and the terminal is itself again however the run ends.
    """

    def __init__(self) -> None:
        self._bars = Progress(
            console=Console(stderr=True),
            transient=True,
            redirect_stdout=sys.stdout.isatty(),
            redirect_stderr=False,
        )

    def __enter__(self) -> 'ProgressBarHook':
        if self._bars.console.is_terminal:
            self._bars.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._bars.stop()

    def before_train(self, runner: Runner) -> None:
        """Begin a bar of iterations."""
        self._begin(runner, 'train', runner.max_iters)

    def before_val_epoch(self, runner: Runner) -> None:
        """Begin a bar of batches."""
        self._begin(runner, 'validate', len(runner.val_dataloader))

    def before_test_epoch(self, runner: Runner) -> None:
        """Begin a bar of batches."""
        self._begin(runner, 'test', len(runner.test_dataloader))

    def after_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        """Advance training's bar."""
        self._show('train', runner.iter + 1)

    def after_val_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        """Advance validation's bar."""
        self._show('validate', batch_idx + 1)

    def after_test_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        """Advance the test's bar."""
        self._show('test', batch_idx + 1)

    def after_val_epoch(self, runner: Runner, metrics: dict | None = None) -> None:
        """Take validation's bar away."""
        self._end('validate')

    def _begin(self, runner: Runner, name: str, total: int) -> None:
        if runner.rank == 0:
            self._bars.add_task(name, total=total)

    def _show(self, name: str, completed: int) -> None:
        for task in self._bars.tasks:
            if task.description == name:
                self._bars.update(task.id, completed=completed)

    def _end(self, name: str) -> None:
        for task in list(self._bars.tasks):
            if task.description == name:
                self._bars.remove_task(task.id)


def _to_channels_last(module: nn.Module, inputs: tuple) -> tuple:
    return tuple(each.to(memory_format=torch.channels_last) for each in inputs)


def bare_model(model: nn.Module) -> nn.Module:
    """Return the network inside wrappers for data parallelism and test-time augmentation."""
    while is_model_wrapper(model) or isinstance(model, BaseTTAModel):
        model = model.module
    return model


def _announced(runner: Runner, which: str) -> set[Path]:
    """Return the paths that CheckpointHook says it saves to: ``last_ckpt``, ``best_ckpt``, or both."""
    info = runner.message_hub.runtime_info
    keys = [key for key in info if key.startswith(which) and key.startswith(('last_ckpt', 'best_ckpt'))]
    return {Path(info[key]) for key in keys if info[key]}


def prepare_resume(runner: Runner, checkpoint: dict) -> None:
    """Let no layer start anew in a run that is resumed, and bring an earlier version's optimizer state into order."""
    model = bare_model(runner.model)
    bank = find_bank(model)
    if runner._resume and bank is not None:
        bank.reset.is_on = False
        put_generators_first(checkpoint, model)


def _other_optimizer(optim_wrapper: OptimWrapper | OptimWrapperDict, stored: Mapping[str, Any]) -> str:
    """Say in what the optimizer that a state was saved by differs from this one, which could not go on from it."""
    if isinstance(optim_wrapper, OptimWrapperDict):
        ours = dict(optim_wrapper.items())
        if stored.keys() != ours.keys():
            return f'the optimizers {", ".join(stored)}, and the config has {", ".join(ours)}'
        return next(filter(None, (_other_optimizer(each, stored[name]) for name, each in ours.items())), '')
    if 'param_groups' not in stored:
        return f'the optimizers {", ".join(stored)}, and the config has one'
    # The wrapper's own list has one more entry, mmengine's base settings, where there are several groups.
    theirs, groups = stored['param_groups'], optim_wrapper.optimizer.param_groups
    if len(theirs) != len(groups):
        return f'an optimizer of {len(theirs)} parameter groups, and the config makes {len(groups)}'
    for position, (their, group) in enumerate(zip(theirs, groups, strict=True)):
        sizes = len(their['params']), len(group['params'])
        if sizes[0] != sizes[1]:
            return f'an optimizer of {sizes[0]} parameters in group {position}, and the config puts {sizes[1]} there'
        kinds = [', '.join(sorted(KIND & each.keys())) or 'none of them' for each in (their, group)]
        if kinds[0] != kinds[1]:
            return f"another kind of optimizer ({kinds[0]}), not the config's ({kinds[1]})"
    return ''


def _delete(runner: Runner, path: Path) -> None:
    """Delete a file if that can be; training goes on in any case."""
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        runner.logger.warning(f'{path} is no longer needed and cannot be deleted ({error.strerror})')


def _delete_orphans(runner: Runner, folder: Path) -> None:
    """Delete what a killed run left: compact files of checkpoints that mmengine has deleted, and half of one."""
    for path in folder.glob('.*.safetensors.*.partial'):
        _delete(runner, path)
    hooks = [hook for hook in runner.hooks if isinstance(hook, CheckpointHook)]
    deletes_steps = any(hook.max_keep_ckpts > 0 for hook in hooks)
    for path in folder.glob('*.safetensors'):
        checkpoint = path.with_suffix('.pth')
        if checkpoint.exists() or _checkpoint_of(path) != checkpoint.name:
            continue
        # mmengine always deletes the best one before, but others only in excess of a number.
        if deletes_steps or path.name.startswith('best_'):
            runner.logger.info(f'{path} goes: mmengine has deleted its checkpoint')
            _delete(runner, path)


def _checkpoint_of(path: Path) -> str | None:
    """Return the name of the checkpoint that the hook wrote a compact file beside, None of other files."""
    try:
        with safe_open(str(path), framework='pt') as file:
            return (file.metadata() or {}).get(OF)
    except (OSError, SafetensorError):
        return None


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
