"""The parts for mmengine, mmsegmentation and mmpretrain.

Importing this module registers ``CSGModel``, ``TaughtModel``, the hooks, the loader of compact
checkpoints and, if mmsegmentation and mmpretrain are installed, data sets, networks and metrics.
"""

import warnings
from contextlib import redirect_stdout
from importlib import import_module
from importlib.metadata import PackageNotFoundError, distribution
from importlib.util import find_spec

from mmengine.config.utils import MODULE2PACKAGE

from . import hooks, model, patches  # noqa: F401
from .checkpoints import descriptions, reading  # noqa: F401

# What each library is needed for.
NEEDS = {
    'mmseg': ('csg_seg.mm.datasets.segmentation', 'csg_seg.mm.networks.deeplab_head'),
    'mmpretrain': ('csg_seg.mm.datasets.classification', 'csg_seg.mm.metrics', 'csg_seg.mm.networks.cifar'),
}
# Name of each library's distribution on PyPI; the maintained distributions are called onedl-*.
DISTRIBUTIONS = {'mmseg': 'mmsegmentation', 'mmpretrain': 'mmpretrain'}

# The libraries print about optional packages and compiled ops that no network here needs. stdout must
# stay clean, because tools print JSON to it.
with redirect_stdout(None), warnings.catch_warnings():
    warnings.filterwarnings('ignore', message='Fail to import ``MultiScaleDeformableAttention``')
    for library in [name for name in NEEDS if find_spec(name) is not None]:
        try:
            for module in NEEDS[library]:
                import_module(module)
        except (ImportError, AssertionError) as error:  # mmseg asserts the versions that it works with
            warnings.warn(f'{DISTRIBUTIONS[library]} is installed but does not import: {error}', stacklevel=2)

# Lets mmengine find configs that start with 'csg_seg::', and with 'mmseg::' if the maintained
# distribution is installed, which has another name than mmengine expects.
MODULE2PACKAGE['csg_seg'] = 'csg_seg'
for library in [name for name in DISTRIBUTIONS if find_spec(name) is not None]:
    try:
        distribution(DISTRIBUTIONS[library])
    except PackageNotFoundError:
        MODULE2PACKAGE[library] = library
