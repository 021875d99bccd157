"""Options that several tools have (--out, --overwrite, --json, --cfg-options), and the check of files to write."""

import os
import re
from argparse import SUPPRESS, ArgumentParser, ArgumentTypeError
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

from csg_seg.errors import CSGError
from csg_seg.files import check_folder


def add_config(parser: ArgumentParser, text: str = 'config file') -> None:
    """Add the positional argument ``config``."""
    parser.add_argument('config', help=text)


def add_checkpoint(
    parser: ArgumentParser, text: str = 'checkpoint of training (.pth) or compact checkpoint (.safetensors)'
) -> None:
    """Add the positional argument ``checkpoint``."""
    parser.add_argument('checkpoint', help=text)


def add_cfg_options(parser: ArgumentParser, text: str = 'override settings: key=value ...') -> None:
    """Add ``--cfg-options``, a dict of settings. It needs mmengine."""
    action = import_module('mmengine.config').DictAction  # tools without a config work without mmengine
    parser.add_argument('--cfg-options', nargs='+', type=_key_and_value, action=action, help=text)


def _key_and_value(text: str) -> str:
    if '=' not in text.lstrip('='):
        raise ArgumentTypeError(f'{text!r} is not key=value')
    if re.search(r'[=\[(,]\s*(dict\(|\{\s*[\'"\d])', text):
        raise ArgumentTypeError(
            f'{text!r} holds a dict; give its keys one by one, as in model.csg.ratio=4, or write a config'
        )
    if re.search(r'=\s*[\[(]', text) and any(text.count(left) != text.count(right) for left, right in ('[]', '()')):
        raise ArgumentTypeError(f'{text!r} has brackets that do not match; quote a value with spaces')
    return text


def add_network_options(parser: ArgumentParser) -> None:
    """Add ``config`` (optional), ``checkpoint`` and ``--cfg-options``, the arguments of ``load_network``."""
    parser.add_argument('config', nargs='?', help='config file; not needed for a compact checkpoint')
    add_checkpoint(parser, '.pth or .safetensors')
    add_cfg_options(parser)


def add_launcher(parser: ArgumentParser) -> None:
    """Add ``--launcher`` and the rank that ``torch.distributed.launch`` passes on."""
    parser.add_argument('--launcher', choices=['none', 'pytorch', 'slurm', 'mpi'], default='none', help='job launcher')
    parser.add_argument('--local_rank', '--local-rank', type=int, default=0, help=SUPPRESS)


def add_out(parser: ArgumentParser, text: str, *, required: bool = True) -> None:
    """Add ``--out``, the file to write."""
    parser.add_argument('--out', required=required, help=text)


def add_overwrite(parser: ArgumentParser, text: str = 'replace OUT when it exists') -> None:
    """Add ``--overwrite``; without it, an existing file is an error."""
    parser.add_argument('--overwrite', action='store_true', help=text)


def add_json(parser: ArgumentParser, text: str = 'print JSON instead of a table') -> None:
    """Add ``--json``, for other programs to read the output."""
    parser.add_argument('--json', action='store_true', help=text)


def check_out(
    out: str | os.PathLike,
    *,
    overwrite: bool,
    option: str = '--out',
    endings: Sequence[str] = (),
    inputs: Sequence[str | os.PathLike | None] = (),
    remedy: str = 'give --overwrite',
) -> None:
    """Check that a file can be written, before anything is computed.

    Args:
        out: the path that the user gave.
        overwrite: whether an existing file may be replaced.
        option: the option that the path was given with.
        endings: allowed suffixes; empty allows any.
        inputs: files that the program reads. They are never overwritten.
        remedy: what to do if the file exists, besides giving another name.

    Raises:
        CSGError: the file cannot be written, or must not be replaced.
    """
    path = Path(out)
    if endings and path.suffix not in endings:
        raise CSGError(f'{option} {out}: the file name must end in {" or ".join(endings)}')
    if path.is_dir():
        raise CSGError(f'{option} {out} is a folder; give a file name')
    if path.exists() and not path.is_file():
        raise CSGError(f'{option} {out} is not a regular file; choose another')
    if path.resolve() in [Path(each).resolve() for each in inputs if each]:
        raise CSGError(f'{option} {out} is also an input; choose another')
    if path.exists() and not overwrite:
        raise CSGError(f'{out} exists; choose another {option}, or {remedy}')
    check_folder(path.parent, given=f'{option} {out}')
