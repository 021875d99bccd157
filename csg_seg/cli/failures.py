"""Errors of command-line tools: one line, without a traceback."""

import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from urllib.error import URLError

from csg_seg.errors import CSGError
from csg_seg.files import describe

# Import names of optional packages, and the extra that installs each.
EXTRAS = {
    'PIL': 'data',
    'pycocotools': 'data',
    'rich': 'data',
    **dict.fromkeys(('mmcv', 'mmengine', 'mmseg', 'mmpretrain', 'torchvision', 'matplotlib', 'scipy', 'cv2'), 'mm'),
    **dict.fromkeys(('onnx', 'onnxruntime', 'onnxscript'), 'mm,onnx'),
}


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Exit with one line and a non-zero status if the error in the ``with`` block is one that the user can correct."""
    try:
        yield
    except CSGError as error:
        sys.exit(f'error: {error}')
    except URLError as error:
        sys.exit(
            f'error: cannot download the weights to start from ({error.reason}); give the path of a local file, or '
            'train without them: --cfg-options model.pretrained=None, or the same for init_cfg'
        )
    except OSError as error:
        sys.exit(f'error: {describe(error)}')
    except KeyError as error:
        # mmengine's, of a type that no imported module registers.
        unknown = re.match(r'\S+ is not in the \S+ registry', str(error.args[0]) if error.args else '')
        if unknown is None:
            raise
        sys.exit(f'error: {unknown[0]}; correct the name, or import the module that registers it (custom_imports)')
    except TypeError as error:
        # Of a class that a config builds; mmengine passes all keys on.
        unknown = re.search(r"(\w+)\.__init__\(\) got an unexpected keyword argument '(\w+)'", str(error))
        if unknown is None:
            raise
        sys.exit(f'error: {unknown[1]} does not take {unknown[2]!r}; correct the key in the config')
    except KeyboardInterrupt:
        print('interrupted', file=sys.stderr)
        sys.exit(130)
    except ModuleNotFoundError as error:
        extra = EXTRAS.get((error.name or '').split('.')[0])
        if extra is None:
            raise
        sys.exit(f"error: {error.name} is not installed; pip install '.[{extra}]' in csg_seg's folder brings it")
