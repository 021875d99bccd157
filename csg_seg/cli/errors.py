"""Errors of command-line tools, in one line."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from csg_seg.errors import CSGError
from csg_seg.files import describe

MM_PACKAGES = ('mmcv', 'mmengine', 'mmseg', 'mmpretrain')

ONNX_PACKAGES = ('onnx', 'onnxruntime', 'onnxscript')

EXTRAS = dict.fromkeys(MM_PACKAGES, 'mm') | dict.fromkeys(ONNX_PACKAGES, 'mm,onnx')


@contextmanager
def one_line_errors() -> Iterator[None]:
    """End the program with one line, and exit status 1, on a mistake the user can mend."""
    try:
        yield
    except CSGError as error:
        sys.exit(f'error: {error}')
    except OSError as error:
        sys.exit(f'error: {describe(error)}')
    except KeyboardInterrupt:
        print('interrupted', file=sys.stderr)
        sys.exit(130)
    except ModuleNotFoundError as error:
        extra = EXTRAS.get((error.name or '').split('.')[0])
        if extra is None:
            raise
        sys.exit(f"error: {error.name} is not installed; pip install '.[{extra}]' in csg_seg's folder brings it")
