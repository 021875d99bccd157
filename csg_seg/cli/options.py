"""Options that tools share."""

import os
from collections.abc import Sequence
from pathlib import Path

from csg_seg.errors import CSGError
from csg_seg.files import check_folder


def check_out(
    out: str | os.PathLike,
    *,
    overwrite: bool,
    option: str = '--out',
    endings: Sequence[str] = (),
    inputs: Sequence[str | os.PathLike | None] = (),
    remedy: str = 'give --overwrite',
) -> None:
    """Refuse, before anything is computed, a file that cannot or must not be written.

    Args:
        out: what the user gave.
        overwrite: whether an existing file may be replaced.
        option: the name it was given under.
        endings: that its name may have; any if there are none.
        inputs: what the program reads, which it never replaces.
        remedy: against an existing file, besides another name.

    Raises:
        CSGError: says which.
    """
    path = Path(out)
    if endings and path.suffix not in endings:
        raise CSGError(f'{option} {out}: the file ends in {" or ".join(endings)}')
    if path.is_dir():
        raise CSGError(f'{option} {out} is a folder; give a file name')
    if path.exists() and not path.is_file():
        raise CSGError(f'{option} {out} is no ordinary file; choose another')
    if path.resolve() in [Path(each).resolve() for each in inputs if each]:
        raise CSGError(f'{option} {out} is what is read here; choose another')
    if path.exists() and not overwrite:
        raise CSGError(f'{out} exists; choose another {option}, or {remedy}')
    check_folder(path.parent, given=f'{option} {out}')
