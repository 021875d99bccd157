"""A generator of random tensors from a seed: ``csg=dict(generator='random_basis', code_dim=74, ...)``."""

import hashlib
import math
from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor

from csg_seg import register_generator
from csg_seg.generators.lengths import row_length
from csg_seg.generators.linear import Generator
from csg_seg.generators.settings import Settings
from csg_seg.generators.signature import read_signature

BYTES = 12


class SeededGenerator(Generator):
    """A frozen generator of random values that are stored as a seed.

    The values are buffers outside the state dict. Loading rebuilds them from the stored seed, with the same bits on
    any machine.
    """

    always_frozen = True
    has_linear_part = False

    @classmethod
    def signature_extras(cls, settings: Settings) -> dict[str, Any]:
        """Return the seed."""
        return {'seed': settings.seed}

    def draw_weight(self, rng: torch.Generator) -> None:
        """Set the values from the settings' seed; ``rng`` is not used."""
        for name, values in self.make_values().items():
            self.register_buffer(name, values, persistent=False)

    @abstractmethod
    def make_values(self) -> dict[str, Tensor]:
        """Return the frozen tensors by name, on the CPU, from the settings' seed; ``weight`` is one of them."""

    def set_extra_state(self, state: Tensor) -> None:
        """Adopt the seed of a stored generator and rebuild its values.

        Raises:
            CSGError: a setting other than the seed differs, or the seed is missing.
        """
        super().set_extra_state(state)
        seed = read_signature(state)['seed']
        if seed != self.settings.seed:
            self.settings = Settings.from_dict({**self.settings.to_dict(), 'seed': seed})
        # Also for the same seed: ``to_empty`` discards the values.
        for name, values in self.make_values().items():
            like = getattr(self, name)
            setattr(self, name, values.to(like.dtype if like.is_meta else like))


@register_generator('random_basis')
class RandomBasisGenerator(SeededGenerator):
    """Slices as combinations of frozen Gaussian tensors: ``slice = code @ weight``.

    Nooralinejad et al., "PRANC: Pseudo RAndom Networks for Compacting deep models", ICCV 2023. Only the coefficients
    are learned; the tensors are made from a seed.

    Differences from the paper: there, one set of coefficients combines whole random networks, each drawn as its layers
    start (Kaiming uniform); training starts at the first of them, with Adam. Here the coefficients are those of a
    slice and all slices share the random tensors, which are scaled to rows of :func:`row_length` as in a linear
    generator; training starts at random coefficients, with the optimizer of the network.

    Attributes:
        weight: ``(code_dim, s_out * s_in * kh * kw)``.
    """

    def make_values(self) -> dict[str, Tensor]:
        """Return ``weight``."""
        code_dim, size = self.settings.code_dim, math.prod(self.settings.slice_shape)
        weight = seeded_normal('weight', (code_dim, size), self.settings.seed)
        return {'weight': weight * (row_length(self.settings) / math.sqrt(size))}


def seeded_normal(name: str, shape: tuple[int, ...], seed: int) -> Tensor:
    """Return nearly Gaussian values of mean 0 and variance 1, with the same bits on any machine.

    A value is the sum of 12 uniform bytes, whose excess kurtosis is -0.1.

    Args:
        name: values of different names are independent.
        shape: of the values.
        seed: values of different seeds are independent.
    """
    # A hash and integers: random numbers and transcendental functions may change with the library.
    hashed = hashlib.shake_256(seed.to_bytes(8, 'little') + name.encode())
    digest = bytearray(hashed.digest(math.prod(shape) * BYTES))
    totals = torch.frombuffer(digest, dtype=torch.uint8).view(-1, BYTES).sum(dim=1, dtype=torch.int32)
    variance = BYTES * (256**2 - 1) / 12
    return ((totals - BYTES * 255 / 2) / math.sqrt(variance)).view(shape)
