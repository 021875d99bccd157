"""Write and find the checkpoints in a work folder."""

import os
from pathlib import Path
from typing import Any

from mmengine.runner import Runner

from csg_seg.errors import CSGError
from csg_seg.files import NotWrittenError, writing
from csg_seg.mm.checkpoints.unpickling import check_file

RESUME = '; use --resume to continue from the last checkpoint'


def guard_checkpoints(runner: Runner, *, after: str = '') -> None:
    """Make the runner raise a clear error and remove the partial file if a checkpoint cannot be written.

    Args:
        runner: a runner that trains.
        after: text to append to the error message.
    """
    save = runner.save_checkpoint

    def save_whole(out_dir: str, filename: str, *args: Any, **options: Any) -> None:
        path = Path(out_dir, filename)
        before = _written(path)
        try:
            with writing(path, after=after):
                save(out_dir, filename, *args, **options)
        except NotWrittenError:
            if _written(path) != before:
                path.unlink(missing_ok=True)  # mmengine leaves a partial file
            raise

    runner.save_checkpoint = save_whole


def check_complete(path: str) -> None:
    """Refuse to resume from a checkpoint that is cut short, and name an earlier one of its folder.

    Raises:
        FileNotFoundError: there is no such file.
        CSGError: the file is cut short.
    """
    try:
        check_file(path)
    except CSGError as error:
        earlier = _newest(Path(path).parent, without=Path(path))
        if earlier is None:
            raise
        raise CSGError(f'{error}, or add --cfg-options load_from={earlier} to resume from an earlier one') from None


def _newest(folder: Path, without: Path | None = None) -> Path | None:
    """Return the newest checkpoint of a folder that is not a best one, None if there is none."""
    steps = [path for path in folder.glob('*.pth') if not path.name.startswith('best_') and path != without]
    return max(steps, key=lambda path: path.stat().st_mtime, default=None)


def _written(path: Path) -> int | None:
    """Return the time of the last write to a file, or None if it does not exist."""
    return path.stat().st_mtime_ns if path.exists() else None


def latest_checkpoint(work_dir: str | os.PathLike) -> str | None:
    """Return the checkpoint to resume from, or None if the folder contains no run.

    Raises:
        CSGError: mmengine's file ``last_checkpoint`` exists but does not name a checkpoint.
    """
    note = Path(work_dir, 'last_checkpoint')
    if not note.exists():
        return None
    newest = _newest(Path(work_dir))
    remedy = f'add --cfg-options load_from={newest}' if newest else 'delete it to start from the beginning'
    compact = max(Path(work_dir).glob('*.safetensors'), key=lambda path: path.stat().st_mtime, default=None)
    if compact and not newest:
        remedy += f', or begin another run with the weights of {compact}: give it as load_from, and another --work-dir'
    if not note.is_file():
        raise CSGError(f'{note}: a folder, not the name of the checkpoint to resume from; {remedy}')
    try:
        named = note.read_text().strip()
    except UnicodeDecodeError:
        named = ''
    if not named:
        raise CSGError(f'{note}: does not name the checkpoint to resume from; {remedy}')
    if '://' not in named and not Path(named).is_file():
        what = 'a folder' if Path(named).is_dir() else 'no such file'
        raise CSGError(f'{note} names {named}: {what}; {remedy}')
    return named
