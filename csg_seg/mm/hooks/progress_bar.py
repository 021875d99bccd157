"""ProgressBarHook: progress bars of training and testing."""

import sys
from typing import Any

from mmengine.hooks import Hook
from mmengine.runner import Runner
from rich.console import Console
from rich.progress import Progress, TaskID


class ProgressBarHook(Hook):
    """Show the progress of training, validation and test on stderr, if that is a terminal.

    Use it as a context manager and enter it before the Runner sets up its log, which then
    appears above the bars. The terminal is restored however the run ends.
    """

    def __init__(self) -> None:
        self._bars = Progress(
            console=Console(stderr=True),
            transient=True,
            redirect_stdout=sys.stdout.isatty(),
            redirect_stderr=False,
        )
        self._tasks: dict[str, TaskID] = {}

    def __enter__(self) -> 'ProgressBarHook':
        if self._bars.console.is_terminal:
            self._bars.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._bars.stop()

    def before_train(self, runner: Runner) -> None:
        """Add training's bar."""
        self._add(runner, 'train', runner.max_iters)

    def _before_epoch(self, runner: Runner, mode: str = 'train') -> None:
        if mode != 'train':
            self._add(runner, mode, len(getattr(runner, f'{mode}_dataloader')))

    def _after_iter(
        self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: Any = None, mode: str = 'train'
    ) -> None:
        if mode in self._tasks:
            self._bars.update(self._tasks[mode], completed=(runner.iter if mode == 'train' else batch_idx) + 1)

    def after_val_epoch(self, runner: Runner, metrics: dict | None = None) -> None:
        """Remove validation's bar."""
        if 'val' in self._tasks:
            self._bars.remove_task(self._tasks.pop('val'))

    def _add(self, runner: Runner, mode: str, total: int) -> None:
        if runner.rank == 0:
            self._tasks[mode] = self._bars.add_task(mode, total=total)
