"""The generator of random signs."""

import hashlib
import math

import torch
from torch import Tensor

from .lengths import sign_value
from .linear import Generator
from .settings import Settings
from .signature import read_signature


class BinaryGenerator(Generator):
    """A frozen generator of random signs, stored as its seed.

    Omidvar et al., AISTATS 2021, "random binary CSG". The authors use +-0.5;
    here the signs are scaled to rows of :func:`row_length`, which codes absorb,
    so that it trains at the same learning rate as the linear generator.
    """

    def _draw_weight(self, rng: torch.Generator) -> None:
        self._rebuild_signs()

    def _rebuild_signs(self) -> None:
        size = math.prod(self.settings.slice_shape)
        n_bits = self.settings.code_dim * size
        # A hash, not a library's random numbers: the same bits for ever and on any device.
        digest = hashlib.shake_256(self.settings.seed.to_bytes(8, 'little')).digest(-(-n_bits // 8))
        packed = torch.frombuffer(bytearray(digest), dtype=torch.uint8)
        bits = (packed[:, None] >> torch.arange(8, device='cpu')).bitwise_and(1).flatten()[:n_bits]
        weight = (bits * 2.0 - 1.0) * sign_value(self.settings)
        self.register_buffer('weight', weight.view(self.settings.code_dim, size), persistent=False)

    def set_extra_state(self, state: Tensor) -> None:
        """Take over the seed of a stored generator and draw its signs again.

        Raises:
            CSGError: one of the settings in ``SIGNATURE`` differs.
        """
        super().set_extra_state(state)
        stored, like = read_signature(state), self.weight
        if stored['seed'] != self.settings.seed:
            self.settings = Settings.from_dict({**self.settings.to_dict(), 'seed': stored['seed']})
        # Whatever the seed: no state dict holds the signs, and ``to_empty`` leaves none.
        self._rebuild_signs()
        self.weight = self.weight.to(like.dtype if like.is_meta else like)
