"""ProgressBarHook: progress bars of training and testing."""

import sys
from typing import Any

from mmengine.hooks import Hook
from mmengine.runner import Runner
from rich.console import Console
from rich.progress import Progress


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

    def __enter__(self) -> 'ProgressBarHook':
        if self._bars.console.is_terminal:
            self._bars.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._bars.stop()

    def before_train(self, runner: Runner) -> None:
        """Add training's bar."""
        self._begin(runner, 'train', runner.max_iters)

    def before_val_epoch(self, runner: Runner) -> None:
        """Add validation's bar."""
        self._begin(runner, 'validate', len(runner.val_dataloader))

    def before_test_epoch(self, runner: Runner) -> None:
        """Add the test's bar."""
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
        """Remove validation's bar."""
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
