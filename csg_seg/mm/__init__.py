"""All that concerns mmengine: the model door, the hook door, data sets, launching.

Importing it registers ``CSGModel``, ``CSGHook``, ``ExactResumeHook``, the loader
of compact checkpoints and, when mmsegmentation is there, ``CamVidDataset``.
"""

import warnings
from contextlib import redirect_stdout
from importlib.metadata import PackageNotFoundError, distribution
from importlib.util import find_spec

from mmengine.config.utils import MODULE2PACKAGE

from . import checkpoint, hooks, model  # noqa: F401

if find_spec('mmseg') is not None:
    try:
        # It prints a note about a package nobody asked for; stdout belongs to programs that read JSON.
        with redirect_stdout(None):
            from . import datasets  # noqa: F401
    except (ImportError, AssertionError) as error:  # mmseg asserts the versions it works with
        warnings.warn(f'mmsegmentation is installed but does not import: {error}', stacklevel=2)
    try:
        distribution('mmsegmentation')
    except PackageNotFoundError:
        # The maintained line is distributed under another name; mmengine then
        # finds the 'mmseg::' configs by the module's.
        MODULE2PACKAGE['mmseg'] = 'mmseg'
