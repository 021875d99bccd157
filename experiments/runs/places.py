"""Options for the folders of data sets and trainings."""

import argparse
import os
from pathlib import Path

CACHE = Path(os.environ.get('XDG_CACHE_HOME') or Path.home() / '.cache')
GIVEN_DATA = os.environ.get('CSG_SEG_DATA')


def add_places(parser: argparse.ArgumentParser) -> None:
    """Add ``--data`` and ``--work-dir``."""
    parser.add_argument(
        '--data',
        type=Path,
        default=Path(GIVEN_DATA, 'data') if GIVEN_DATA else Path('data'),
        help='folder that holds the data sets (default: data in $CSG_SEG_DATA, or data)',
    )
    default = CACHE / 'csg_seg' / 'runs'
    parser.add_argument(
        '--work-dir', type=Path, default=default, help='folder for logs and checkpoints (default: %(default)s)'
    )
