"""Compress a CNN: one small generator and short codes make the filters of all its convs.

Convolutional Slice Generator, Omidvar et al., "Associative Convolutional Layers",
AISTATS 2021 (PMLR 130:3115-3123). Importing this package also registers its
mmengine parts, when mmengine is installed.
"""

import warnings
from importlib.util import find_spec

from .builders import register_builder
from .checkpoint import load_compact, save_compact
from .errors import CSGError, CSGWarning
from .plan import plan
from .report import summarise
from .retrofit import fit, load_generators, load_state_dict, materialise, retrofit
from .version import __version__

if find_spec('mmengine') is not None:
    try:
        from . import mm as _mm  # noqa: F401
    except ImportError as error:
        warnings.warn(f'mmengine is installed but does not import: {error}', stacklevel=2)

__all__ = [
    'CSGError',
    'CSGWarning',
    '__version__',
    'fit',
    'load_compact',
    'load_generators',
    'load_state_dict',
    'materialise',
    'plan',
    'register_builder',
    'retrofit',
    'save_compact',
    'summarise',
]
