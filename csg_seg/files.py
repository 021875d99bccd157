"""Write files whole or not at all, and say in one line why a file could not be written."""

import errno
import logging
import os
import re
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import get_native_id
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
# Errors of a disk that is full or read-only.
DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
# Bytes of the file written to test a folder, one block of most disks.
TRIAL_BYTES = 4096


class NotWrittenError(CSGError, OSError):
    """A file could not be written, because of the disk or of permissions.

    Args:
        what: the file.
        why: the system's error, and what to do.
    """

    def __init__(self, what: str | os.PathLike, why: str):
        super().__init__(f'{what}: {why}')
        self.what, self.why = str(what), why

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.what, self.why)  # for errors raised in worker processes


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Call ``write`` with a temporary path, and rename the file to ``path`` once it is complete.

    A symbolic link stays, and the file it leads to is replaced.

    Raises:
        NotWrittenError: the file cannot be written.
    """
    path = Path(os.path.realpath(path))
    partial = path.with_name(f'.{path.name}.{os.getpid()}-{get_native_id()}.partial')
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            write(partial)
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)


def write_tensors(path: Path, content: Any) -> None:
    """Write a file by ``torch.save``, whole or not at all.

    Raises:
        NotWrittenError: the file cannot be written.
    """

    def write(partial: Path) -> None:
        # Given a path, torch opens the file itself and loses the system's error.
        with partial.open('wb') as file:
            torch.save(content, file)

    write_whole(path, write)


@contextmanager
def writing(path: str | os.PathLike, *, after: str = '') -> Iterator[None]:
    """Turn the system's errors in a ``with`` block that writes a file into one that names the file.

    Args:
        path: the file.
        after: text to append to the message.

    Raises:
        NotWrittenError: the file cannot be written.
    """
    try:
        yield
    except NotWrittenError as error:  # of the same file under its temporary name
        raise NotWrittenError(path, error.why) from None
    except CSGError:
        raise
    # torch and safetensors wrap the system's errors in their own.
    except Exception as error:
        number = _error_number(error)
        if number is None:
            raise
        raise NotWrittenError(path, f'cannot be written ({os.strerror(number)}); {_remedy(number)}{after}') from None


@contextmanager
def writing_into(folder: str | os.PathLike, *, after: str = '') -> Iterator[None]:
    """Turn errors of a full or read-only disk in a ``with`` block into one that names the folder it writes into.

    Args:
        folder: for logs and results.
        after: text to append to the message.

    Raises:
        NotWrittenError: a file in the folder cannot be written.
    """
    # Otherwise logging prints a traceback for each line that does not fit on the disk.
    before, logging.raiseExceptions = logging.raiseExceptions, False
    try:
        yield
    except OSError as error:
        # An error with a file name may come from reading, and one with another number has other causes.
        if error.errno not in DISK or error.filename is not None:
            raise
        why = f'a file in it cannot be written ({os.strerror(error.errno)})'
        raise NotWrittenError(folder, f'{why}; {_remedy(error.errno)}{after}') from None
    finally:
        logging.raiseExceptions = before


def check_folder(folder: str | os.PathLike, *, given: str) -> None:
    """Check that files can be written into a folder, before anything is computed.

    Args:
        folder: created later if it does not exist.
        given: the user's argument to name in the error, such as '--work-dir runs'.

    Raises:
        CSGError: the folder is a file, or files cannot be written into it.
    """
    path = Path(folder).absolute()
    nearest = next(each for each in (path, *path.parents) if each.exists())
    try:
        if not nearest.is_dir():
            raise CSGError(f'{given}: {nearest} is a file; give a folder')
        with tempfile.TemporaryFile(dir=nearest) as file:
            file.write(bytes(TRIAL_BYTES))
            file.flush()
    except OSError as error:
        number = error.errno or errno.EIO
        why = f'nothing can be written in {nearest} ({os.strerror(number)})'
        raise NotWrittenError(given, f'{why}; {_remedy(number)}') from None


def describe(error: OSError) -> str:
    """Describe an error of the system in one line: the file, the error, and what to do."""
    if error.errno is None or error.strerror is None:
        # The error of a data loader's process contains a traceback, whose last line is the error.
        lines = str(error).strip().splitlines() or [type(error).__name__]
        return lines[-1] if 'Traceback' in str(error) else ' '.join(map(str.strip, lines))
    where = 'a file' if error.filename is None else error.filename
    return f'{where}: {error.strerror}; {_remedy(error.errno)}'


def _remedy(number: int) -> str:
    return REMEDIES.get(number, 'correct that, and repeat the command')


def _error_number(error: BaseException | None) -> int | None:
    """Return the number of the system's error that a library has wrapped, or None."""
    while error is not None:
        if isinstance(error, OSError) and error.errno is not None:
            return error.errno
        found = re.search(r'\(os error (\d+)\)', str(error))
        if found:
            return int(found[1])
        # torch and safetensors do not set __cause__; for other errors, the context is not the cause.
        wraps = type(error) is RuntimeError or isinstance(error, SafetensorError)
        error = error.__cause__ or (error.__context__ if wraps else None)
    return None
