"""CompactCheckpointHook: write a compact file beside each .pth."""

from pathlib import Path
from typing import Any

from mmengine.hooks import CheckpointHook, Hook
from mmengine.registry import HOOKS
from mmengine.runner import Runner
from safetensors import SafetensorError, safe_open

from csg_seg.errors import CSGError
from csg_seg.files import NotWrittenError, writing
from csg_seg.mm.checkpoints.writing import write_with_config
from csg_seg.mm.model import bare_model

# Metadata entry with the name of the checkpoint that the hook wrote a compact file for.
OF = 'checkpoint'


@HOOKS.register_module()
class CompactCheckpointHook(Hook):
    """Write a compact file (``.safetensors``) beside each checkpoint, and delete both together.

    If a file cannot be written, or weights are not finite, the hook logs a warning and training
    continues. A compact file contains the name of its checkpoint. A resumed run deletes files
    whose checkpoint is gone, which a killed run may leave; it keeps copies under other names,
    and every file if mmengine keeps all checkpoints.
    """

    # After EMAHook puts the averaged weights into the checkpoint and CheckpointHook saves it.
    priority = 'LOWEST'

    def __init__(self) -> None:
        self._checkpoint: dict | None = None
        self._saved: dict[Path, int] = {}

    def before_train(self, runner: Runner) -> None:
        """Note the checkpoints that exist, and delete compact files without a checkpoint in a resumed run."""
        for folder in {Path(runner.work_dir), *(path.parent for path in _announced(runner, ''))}:
            self._saved |= {path: path.stat().st_mtime_ns for path in folder.glob('*.pth')}
            if runner._resume and runner._has_loaded and runner.rank == 0:
                _delete_orphans(runner, folder)

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Keep the weights that are about to be saved."""
        self._checkpoint = checkpoint

    def after_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        """Write the compact file of a checkpoint saved in this iteration."""
        self._write(runner, 'last_ckpt')

    def after_train_epoch(self, runner: Runner) -> None:
        """Write the compact file of a checkpoint saved in this epoch."""
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
                what = bare_model(runner.model), checkpoint['state_dict']
                try:
                    with writing(compact):
                        write_with_config(*what, compact, runner.cfg, dataset_meta, notes={OF: path.name})
                except CSGError as error:
                    if isinstance(error, NotWrittenError):
                        said = f'{error}. Training continues; tools/compact.py can make the file later.'
                    else:
                        said = f'{compact} was not written. {error}. Training continues.'
                    runner.logger.warning(said)
                    _delete(runner, compact)  # it belongs to an older checkpoint of the same name
                self._saved[path] = saved
        for path in [path for path in self._saved if not path.exists()]:
            _delete(runner, path.with_suffix('.safetensors'))
            del self._saved[path]


def _announced(runner: Runner, which: str) -> set[Path]:
    """Return the paths of CheckpointHook's last checkpoint, its best ones, or both."""
    info = runner.message_hub.runtime_info
    keys = [key for key in info if key.startswith(which) and key.startswith(('last_ckpt', 'best_ckpt'))]
    return {Path(info[key]) for key in keys if info[key]}


def _delete(runner: Runner, path: Path) -> None:
    """Delete a file, or log a warning."""
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        runner.logger.warning(f'{path} is no longer needed and cannot be deleted ({error.strerror})')


def _delete_orphans(runner: Runner, folder: Path) -> None:
    """Delete compact files that a killed run left: those without a checkpoint, and unfinished ones."""
    for path in folder.glob('.*.safetensors.*.partial'):
        _delete(runner, path)
    hooks = [hook for hook in runner.hooks if isinstance(hook, CheckpointHook)]
    deletes_steps = any(hook.max_keep_ckpts > 0 for hook in hooks)
    for path in folder.glob('*.safetensors'):
        checkpoint = path.with_suffix('.pth')
        if checkpoint.exists() or _checkpoint_of(path) != checkpoint.name:
            continue
        # mmengine keeps one best checkpoint, and the others unless max_keep_ckpts is set.
        if deletes_steps or path.name.startswith('best_'):
            runner.logger.info(f'{path}: deleted, because its checkpoint is gone')
            _delete(runner, path)


def _checkpoint_of(path: Path) -> str | None:
    """Return the name of the checkpoint that the hook wrote a compact file for, or None for other files."""
    try:
        with safe_open(str(path), framework='pt') as file:
            return (file.metadata() or {}).get(OF)
    except (OSError, SafetensorError):
        return None
