"""What the command-line tools share without needing any mm package."""

import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from .errors import CSGError

# Of mmcv without compiled ops, at every start; no network of ours uses the op.
warnings.filterwarnings('ignore', message='Fail to import ``MultiScaleDeformableAttention``')

MM_PACKAGES = ('mmcv', 'mmengine', 'mmseg', 'mmpretrain')


@contextmanager
def one_line_errors() -> Iterator[None]:
    """End the program with one line, and exit status 1, on a mistake the user can mend."""
    try:
        yield
    except (CSGError, FileNotFoundError) as error:
        sys.exit(f'error: {error}')
    except KeyboardInterrupt:
        print('interrupted', file=sys.stderr)
        sys.exit(130)
    except ModuleNotFoundError as error:
        if (error.name or '').split('.')[0] not in MM_PACKAGES:
            raise
        sys.exit(f"error: {error.name} is not installed; pip install '.[mm]' in csg_seg's folder brings it")
