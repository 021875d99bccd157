"""Register everything for mmengine, mmsegmentation and mmpretrain.

Importing this module registers ``CSGModel``, ``TaughtModel``, the hooks and the loader of compact
checkpoints. If mmsegmentation and mmpretrain are installed, it also registers data sets, networks
and metrics.
"""

import warnings
from contextlib import redirect_stdout
from importlib import import_module
from importlib.metadata import PackageNotFoundError, distribution
from importlib.util import find_spec
from typing import Any

from mmengine.config.utils import MODULE2PACKAGE

from . import hooks, mixed_precision, model, patches  # noqa: F401
from .checkpoints import descriptions, reading  # noqa: F401

# For each library: its distribution on PyPI, and the modules here that need the library.
LIBRARIES = {
    'mmseg': ('mmsegmentation', ('datasets.segmentation', 'networks.deeplab_head')),
    'mmpretrain': ('mmpretrain', ('datasets.classification', 'metrics', 'networks.cifar')),
}

# mmengine finds configs that start with 'csg_seg::' in this package.
MODULE2PACKAGE['csg_seg'] = 'csg_seg'

for library, (distribution_name, modules) in LIBRARIES.items():
    if find_spec(library) is None:
        continue
    # The libraries print notes on optional packages. stdout must stay clean, because tools print JSON to it.
    with redirect_stdout(None), warnings.catch_warnings():
        warnings.filterwarnings('ignore', message='Fail to import ``MultiScaleDeformableAttention``')
        try:
            if library == 'mmpretrain':
                dependency: Any = import_module('mmpretrain.utils.dependency')
                # mmpretrain's multimodal networks do not import with transformers 5; without them, the rest does.
                dependency.WITH_MULTIMODAL &= not dependency.satisfy_requirement('transformers>=5')
            for module in modules:
                import_module(f'{__name__}.{module}')
        except (ImportError, AssertionError) as error:  # mmseg asserts the versions that it works with
            warnings.warn(f'{distribution_name} is installed but cannot be imported: {error}', stacklevel=2)
    try:
        distribution(distribution_name)
    except PackageNotFoundError:  # the maintained distribution, onedl-*, for which mmengine's own name is wrong
        MODULE2PACKAGE[library] = library
