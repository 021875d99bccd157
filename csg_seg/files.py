"""Files that are written whole or not at all, and a line that says why one was not."""

import errno
import logging
import os
import re
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from .errors import CSGError

REMEDIES = {
    errno.ENOSPC: 'free space there, or choose another place',
    errno.EDQUOT: 'free space there, or choose another place',
    errno.EFBIG: 'raise the limit of file sizes (ulimit -f), or choose another place',
    errno.EROFS: 'choose another place',
    errno.EACCES: 'change its permissions, or choose another place',
    errno.EPERM: 'change its permissions, or choose another place',
    errno.EISDIR: 'give a file',
    errno.ENAMETOOLONG: 'give a shorter name',
}
# What a disk refuses that is full or closed.
DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
# Less than any file takes on a disk.
SMALLEST = 1 << 12


class NotWrittenError(CSGError, OSError):
    """A file that the disk, or a right, did not let be written.

    Args:
        what: the file.
        why: what the system said, and what to do.
    """

    def __init__(self, what: str | os.PathLike, why: str):
        super().__init__(f'{what}: {why}')
        self.what, self.why = str(what), why

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.what, self.why)  # so that it comes whole out of another process


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Have ``write`` fill a file that takes its name only once it is complete.

    Raises:
        NotWrittenError: says why.
    """
    partial = path.with_name(f'.{path.name}.{os.getpid()}.partial')
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            write(partial)
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)


def write_tensors(path: Path, content: Any) -> None:
    """Write what ``torch.save`` takes, whole or not at all.

    Raises:
        NotWrittenError: says why.
    """

    def write(partial: Path) -> None:
        # Of a path, torch opens the file itself and forgets why it could not be written.
        with partial.open('wb') as file:
            torch.save(content, file)

    write_whole(path, write)


@contextmanager
def writing(path: str | os.PathLike, *, after: str = '') -> Iterator[None]:
    """Name the file that is written here, if it cannot be.

    Args:
        path: of the file.
        after: what else to say.

    Raises:
        NotWrittenError: says why.
    """
    try:
        yield
    except NotWrittenError as error:  # of the same file, while it had another name
        raise NotWrittenError(path, error.why) from None
    except CSGError:
        raise
    # torch and safetensors have errors of their own, made from those of the system.
    except Exception as error:
        code = _error_number(error)
        if code is None:
            raise
        raise NotWrittenError(path, f'cannot be written ({os.strerror(code)}); {_remedy(code)}{after}') from None


@contextmanager
def writing_into(folder: str | os.PathLike, *, after: str = '') -> Iterator[None]:
    """Name the folder whose logs and results are written here, if one of them cannot be.

    Args:
        folder: where a run writes.
        after: what else to say.

    Raises:
        NotWrittenError: says why.
    """
    # A line that the disk has no room for is left out of the log; a traceback in its place says no more.
    before, logging.raiseExceptions = logging.raiseExceptions, False
    try:
        yield
    except OSError as error:
        # One with a name may be of a file that is read, and a number may be of other things than disks.
        if error.errno not in DISK or error.filename is not None:
            raise
        why = f'a file in it cannot be written ({os.strerror(error.errno)})'
        raise NotWrittenError(folder, f'{why}; {_remedy(error.errno)}{after}') from None
    finally:
        logging.raiseExceptions = before


def check_folder(folder: str | os.PathLike, *, given: str) -> None:
    """Refuse, before anything is computed, a folder that nothing can be written in.

    Args:
        folder: where files will go; made later if it is absent.
        given: what the user gave, such as '--work-dir runs'.

    Raises:
        CSGError: says why.
    """
    path = Path(folder).absolute()
    nearest = next(each for each in (path, *path.parents) if each.exists())
    try:
        if not nearest.is_dir():
            raise CSGError(f'{given}: {nearest} is a file; give a folder')
        with tempfile.TemporaryFile(dir=nearest) as file:
            file.write(bytes(SMALLEST))
            file.flush()
    except OSError as error:
        code = error.errno or errno.EIO
        why = f'nothing can be written in {nearest} ({os.strerror(code)})'
        raise NotWrittenError(given, f'{why}; {_remedy(code)}') from None


def describe(error: OSError) -> str:
    """Say in one line what the system refused, where, and what to do."""
    if error.errno is None or error.strerror is None:
        # A process that loads data hands its whole traceback over; its last line is the error.
        lines = str(error).strip().splitlines() or [type(error).__name__]
        return lines[-1] if 'Traceback' in str(error) else ' '.join(map(str.strip, lines))
    where = 'a file' if error.filename is None else error.filename
    return f'{where}: {error.strerror}; {_remedy(error.errno)}'


def _remedy(code: int) -> str:
    return REMEDIES.get(code, 'mend that, and repeat the command')


def _error_number(error: BaseException | None) -> int | None:
    """Return the number of the system's error behind a library's, or None."""
    while error is not None:
        if isinstance(error, OSError) and error.errno is not None:
            return error.errno
        told = re.search(r'\(os error (\d+)\)', str(error))
        if told:
            return int(told[1])
        # Their own errors hide the system's; anybody else's has causes of its own.
        hides = type(error) is RuntimeError or isinstance(error, SafetensorError)
        error = error.__cause__ or (error.__context__ if hides else None)
    return None
