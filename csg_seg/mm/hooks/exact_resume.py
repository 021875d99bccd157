"""ExactResumeHook: resume a run with the random numbers of an uninterrupted one."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from mmengine.runner import EpochBasedTrainLoop, Runner, set_random_seed
from rich.console import Console
from rich.progress import track


@HOOKS.register_module()
class ExactResumeHook(Hook):
    """Make a resumed run end with the same weights as an uninterrupted run of the same seed.

    mmengine restores the order of the data; this hook restores the random numbers.
    In iteration-based runs, checkpoints contain torch's random state, which dropout
    uses. Validation leaves this state as it was, because a run that resumes after a
    validation does not repeat it. For augmentation, a resumed run loads all batches
    again that it was trained on, which takes a while. In epoch-based runs, each epoch
    is seeded with a number drawn from seed and epoch; this covers augmentation only
    with ``num_workers=0``.
    With ``accumulative_counts``, the gradients of a step that has begun are in no checkpoint, so a run that resumes
    inside a step ends with other weights, and says so.
    The hook does nothing without a fixed ``randomness.seed``, or if ranks have different seeds.
    """

    def __init__(self) -> None:
        self._states: Sequence[torch.Tensor] | None = None
        self._before_val: Sequence[torch.Tensor] | None = None

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Store the random states of the CPU and of this process's GPU.

        Within a validation, as ``save_best`` writes checkpoints, they are those from before it.
        """
        checkpoint['random_state'] = _random_states() if self._before_val is None else self._before_val

    def before_val(self, runner: Runner) -> None:
        """Remember the random states: data loaders of validation draw from them."""
        self._before_val = _random_states() if self._is_exact(runner) else None

    def after_val(self, runner: Runner) -> None:
        """Restore the random states."""
        if self._before_val is not None:
            _set_random_states(self._before_val)
            self._before_val = None

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Read the random states of a run that resumes."""
        if runner._resume and self._is_exact(runner):
            self._states = checkpoint.get('random_state')

    def before_train(self, runner: Runner) -> None:
        """Load the batches again that the run was trained on."""
        self._before_val = None  # of a validation that was interrupted
        loop = runner.train_loop
        batches = getattr(runner.optim_wrapper, '_accumulative_counts', 1)
        if runner.iter % batches:
            runner.logger.warning(
                f'This run resumes inside an optimizer step of {batches} batches, whose gradients are lost, so it ends '
                f'with other weights; save checkpoints at multiples of {batches} iterations.'
            )
        if isinstance(loop, EpochBasedTrainLoop):
            return
        # Older versions of mmengine have no such attribute and always load the data again.
        if runner.iter == 0 or getattr(loop, 'fast_forward_on_resume', True) or not self._is_exact(runner):
            return
        runner.logger.info(
            f'Exact resume: loading {runner.iter} batches again to restore the random numbers of augmentation.'
        )
        for _ in track(range(runner.iter), 'Loading again', console=Console(stderr=True), disable=runner.rank != 0):
            next(loop.dataloader_iterator)
        loop.fast_forward_on_resume = True

    def before_train_epoch(self, runner: Runner) -> None:
        """Seed each epoch."""
        if isinstance(runner.train_loop, EpochBasedTrainLoop) and self._is_exact(runner):
            self._states = None
            # Hashed, so that epochs of different seeds never share a seed.
            mixed = np.random.SeedSequence([runner.cfg.randomness.seed, runner.epoch]).generate_state(1)[0]
            set_random_seed(int(mixed))

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None) -> None:
        """Restore torch's random states in the first iteration."""
        if self._states is None:
            return
        _set_random_states(self._states)
        self._states = None

    @staticmethod
    def _is_exact(runner: Runner) -> bool:
        randomness = runner.cfg.get('randomness') or {}
        return randomness.get('seed') is not None and not randomness.get('diff_rank_seed', False)


def _random_states() -> list[torch.Tensor]:
    """Return the random state of the CPU and, if there is one, that of this process's GPU."""
    return [torch.get_rng_state(), *([torch.cuda.get_rng_state()] if torch.cuda.is_available() else [])]


def _set_random_states(states: Sequence[torch.Tensor]) -> None:
    cpu, *cuda = (state.cpu() for state in states)
    torch.set_rng_state(cpu)
    if cuda and torch.cuda.is_available():
        torch.cuda.set_rng_state(cuda[0])
