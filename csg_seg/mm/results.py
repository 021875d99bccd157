"""Results of the comparing tools: their options, the file they go to, pictures of them."""

import json
import os
import shlex
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from ..cli import check_out
from ..errors import CSGError
from ..files import write_whole


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


def save_figure(figure: Figure, path: str | os.PathLike, *, dpi: int = 150) -> None:
    """Save a picture, and make the folder it goes to.

    Raises:
        CSGError: the path cannot be written, or its ending names no format.
    """
    path = Path(path)
    try:
        write_whole(path, lambda partial: figure.savefig(partial, dpi=dpi, format=path.suffix[1:]))
    except CSGError:
        raise
    except ValueError as error:
        raise CSGError(f'{path}: cannot be drawn ({error}); give a name that ends in .png') from None
