"""The kinds of generators."""

import torch

from experiments.rivals.tensor_ring import TensorRingGenerator

from .binary import BinaryGenerator
from .linear import Generator
from .mlp import MLPGenerator
from .settings import Settings

_KINDS = {
    'linear': Generator,
    'binary': BinaryGenerator,
    'mlp': MLPGenerator,
    'tensor_ring': TensorRingGenerator,
}


def build_generator(settings: Settings, rng: torch.Generator) -> Generator:
    """Build the generator that the settings name; ``rng`` draws its start values, unless it is binary."""
    return _KINDS[settings.generator](settings, rng)
