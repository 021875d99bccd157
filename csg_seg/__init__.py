"""Compress CNNs: one small generator and short codes produce the filters of all convs.

Convolutional Slice Generator (CSG), Omidvar et al., "Associative Convolutional Layers",
AISTATS 2021 (PMLR 130:3115-3123).

This package needs only torch, numpy and safetensors. Everything for mmengine, mmsegmentation and
mmpretrain is in :mod:`csg_seg.mm`, which configs import: ``custom_imports = dict(imports=['csg_seg.mm'])``.
"""

from .distillation import Teacher
from .errors import CSGError, CSGWarning
from .generators.registry import register_generator
from .planning.planner import plan
from .registration import register_with_mmengine
from .report import summarise
from .retrofitting.automatic import suggest
from .retrofitting.freezing import train_only
from .retrofitting.surgery import materialise, retrofit
from .retrofitting.weights import fit, load_generators, load_state_dict, share_generators
from .storage.builders import register_builder
from .storage.compact import load_compact, save_compact
from .version import __version__

__all__ = [
    'CSGError',
    'CSGWarning',
    'Teacher',
    '__version__',
    'fit',
    'load_compact',
    'load_generators',
    'load_state_dict',
    'materialise',
    'plan',
    'register_builder',
    'register_generator',
    'retrofit',
    'save_compact',
    'share_generators',
    'suggest',
    'summarise',
    'train_only',
]

register_with_mmengine()
