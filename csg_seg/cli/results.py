"""Result files: options, command, versions."""

import json
import platform
import shlex
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mmengine
import torch

from csg_seg.errors import CSGError
from csg_seg.files import write_whole
from csg_seg.version import __version__

from .options import check_out


def add_result_options(parser: ArgumentParser, *, picture: str = '') -> None:
    """Add ``--out``, ``--overwrite`` and ``--json``; ``--picture`` too, if it is said what is drawn."""
    if picture:
        parser.add_argument('--picture', help=f'also draw {picture} (.png)')
    parser.add_argument('--out', help='also write the result to this JSON file')
    parser.add_argument('--overwrite', action='store_true', help='replace files that exist')
    parser.add_argument('--json', action='store_true', help='print JSON instead of a table')


def check_result_options(args: Namespace) -> None:
    """Refuse, before anything is computed, to replace a result or its picture unasked.

    Raises:
        CSGError: a file exists, or cannot be written.
    """
    if args.out:
        check_out(args.out, overwrite=args.overwrite)
    if getattr(args, 'picture', None):
        check_out(args.picture, overwrite=args.overwrite, option='--picture', endings=['.png'])
        if args.out and Path(args.out).resolve() == Path(args.picture).resolve():
            raise CSGError('--out and --picture are one file; give each its own')


def write_result(args: Namespace, figures: Mapping[str, Any]) -> dict[str, Any]:
    """Put the command before the figures, and write both to the file that was asked for, if one was."""
    result = {'command': shlex.join(['python', *sys.argv]), **figures}
    if args.out:
        write_whole(Path(args.out), lambda partial: partial.write_text(json.dumps(result, indent=2) + '\n'))
    return result


def made_with(*, seed: int) -> dict[str, Any]:
    """Return the versions and the device that a result was measured with."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f'CPU, {torch.get_num_threads()} threads'
    versions = {'csg_seg': __version__, 'torch': torch.__version__, 'mmengine': mmengine.__version__}
    versions['python'] = platform.python_version()
    return {'seed': seed, 'device': device, **versions}
