"""Resuming with the same random numbers."""

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
