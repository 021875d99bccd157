"""All that concerns mmengine: the model door, the hook door, data sets, launching.

Importing it registers ``CSGModel``, ``TaughtModel``, ``CSGHook``, ``ExactResumeHook``, ``ProximalHook``, the loader
of compact checkpoints and, as far as mmsegmentation and mmpretrain are there,
data sets, CIFAR networks and metrics.
"""

import warnings
from contextlib import redirect_stdout
from importlib.metadata import PackageNotFoundError, distribution
from importlib.util import find_spec

from mmengine.config.utils import MODULE2PACKAGE

from . import builder, checkpoint, hooks, model, optimizers, proximal  # noqa: F401

# They print a note about a package nobody asked for, and warn that mmcv has no compiled ops, which none of
# our networks uses; stdout belongs to programs that read JSON.
with redirect_stdout(None), warnings.catch_warnings():
    warnings.filterwarnings('ignore', message='Fail to import ``MultiScaleDeformableAttention``')
    if find_spec('mmseg') is not None:
        try:
            from . import deeplab, seg_datasets  # noqa: F401
        except (ImportError, AssertionError) as error:  # mmseg asserts the versions it works with
            warnings.warn(f'mmsegmentation is installed but does not import: {error}', stacklevel=2)
    if find_spec('mmpretrain') is not None:
        try:
            from . import cls_datasets, metrics, networks  # noqa: F401
        except (ImportError, AssertionError) as error:
            warnings.warn(f'mmpretrain is installed but does not import: {error}', stacklevel=2)

# For configs that begin with 'csg_seg::'.
MODULE2PACKAGE['csg_seg'] = 'csg_seg'

for module, package in (('mmseg', 'mmsegmentation'), ('mmpretrain', 'mmpretrain')):
    try:
        distribution(package)
    except PackageNotFoundError:
        # The maintained line is distributed under another name; mmengine then
        # finds the 'mmseg::' and 'mmpretrain::' configs by the module's.
        if find_spec(module) is not None:
            MODULE2PACKAGE[module] = module
