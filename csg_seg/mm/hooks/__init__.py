"""Hooks for mmengine's Runner, one behaviour a file."""

from .accumulation import AccumulationHook
from .channels_last import ChannelsLastHook
from .checkpoint_guard import CheckpointGuardHook
from .compact_checkpoint import CompactCheckpointHook
from .csg import CSGHook
from .exact_resume import ExactResumeHook
from .label_guard import LabelGuardHook
from .progress_bar import ProgressBarHook

__all__ = [
    'AccumulationHook',
    'CSGHook',
    'ChannelsLastHook',
    'CheckpointGuardHook',
    'CompactCheckpointHook',
    'ExactResumeHook',
    'LabelGuardHook',
    'ProgressBarHook',
]
