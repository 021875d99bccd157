"""Result files: the command, its figures, and the versions and device that made them."""

import json
import os
import platform
import shlex
import sys
from argparse import ArgumentParser
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mmengine
import torch

from csg_seg.errors import CSGError
from csg_seg.files import write_whole
from csg_seg.version import __version__

from .options import add_json, add_out, add_overwrite, check_out


def add_result_options(parser: ArgumentParser, *, picture: str = '') -> None:
    """Add ``--out``, ``--overwrite`` and ``--json``, and ``--picture`` if ``picture`` says what it shows."""
    if picture:
        parser.add_argument('--picture', help=f'also draw {picture} (.png)')
    add_out(parser, 'also write the result to this JSON file', required=False)
    add_overwrite(parser, 'replace files that exist')
    add_json(parser)


def check_result_options(
    out: str | os.PathLike | None, *, overwrite: bool, picture: str | os.PathLike | None = None
) -> None:
    """Check that the result and its picture can be written, before anything is computed.

    Raises:
        CSGError: a file exists, or cannot be written.
    """
    if out:
        check_out(out, overwrite=overwrite)
    if picture:
        check_out(picture, overwrite=overwrite, option='--picture', endings=['.png'])
        if out and Path(out).resolve() == Path(picture).resolve():
            raise CSGError('--out and --picture are one file; give each its own')


def write_result(out: str | os.PathLike | None, figures: Mapping[str, Any]) -> dict[str, Any]:
    """Add the command to the figures, and write them to a JSON file.

    Args:
        out: the file; None writes nothing.
        figures: JSON-ready.

    Returns:
        the command and the figures.
    """
    result = {'command': typed_command(), **figures}
    if out:
        write_whole(Path(out), lambda partial: partial.write_text(json.dumps(result, indent=2) + '\n'))
    return result


def typed_command() -> str:
    """Return the command as the user typed it."""
    program, *args = sys.argv
    path = Path(program)
    if path.name == '__main__.py':  # of a package, such as experiments/speed
        return shlex.join(['python', '-m', '.'.join(path.absolute().parts[-3:-1]), *args])
    return shlex.join(['python', program, *args])


def made_with(*, seed: int) -> dict[str, Any]:
    """Return the versions and the device that a result was measured with."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f'CPU, {torch.get_num_threads()} threads'
    versions = {'csg_seg': __version__, 'torch': torch.__version__, 'mmengine': mmengine.__version__}
    versions['python'] = platform.python_version()
    return {'seed': seed, 'device': device, **versions}
