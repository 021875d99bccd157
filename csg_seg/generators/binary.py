"""The generator of random signs."""

import hashlib
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .lengths import row_length
from .linear import Generator
from .registry import register_generator
from .settings import Settings
from .signature import VALUE, read_signature


@register_generator('binary')
class BinaryGenerator(Generator):
    """A frozen generator of random signs, stored as its seed.

    Omidvar et al., AISTATS 2021, "random binary CSG". The authors use +-0.5. Here
    the signs are scaled to rows of :func:`row_length`, so the linear generator's
    learning rate fits; the codes absorb the factor.
    """

    always_frozen = True
    has_linear_part = False

    @classmethod
    def signature_extras(cls, settings: Settings) -> dict[str, Any]:
        """Return the size of the signs, so codes are never read with signs of another size, and the seed."""
        return {VALUE: _sign_size(settings), 'seed': settings.seed}

    def draw_weight(self, rng: torch.Generator) -> None:
        """Set the signs from the settings' seed; ``rng`` is not used."""
        self._rebuild_signs()

    def reset_parameters(self) -> None:
        """Restore the signs, which ``to_empty`` discards."""
        like = self.weight
        self._rebuild_signs()
        self.weight = self.weight.to(like)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Move or cast the signs; after a cast, rebuild them, so that rounding errors do not remain."""
        before = self.weight.dtype
        result = super()._apply(fn, recurse)
        if self.weight.dtype != before:
            self.reset_parameters()
        return result

    def _rebuild_signs(self) -> None:
        size = math.prod(self.settings.slice_shape)
        n_bits = self.settings.code_dim * size
        # A hash gives the same bits on any device and in any version; a library's random numbers may not.
        digest = hashlib.shake_256(self.settings.seed.to_bytes(8, 'little')).digest(-(-n_bits // 8))
        packed = torch.frombuffer(bytearray(digest), dtype=torch.uint8)
        bits = (packed[:, None] >> torch.arange(8, device='cpu')).bitwise_and(1).flatten()[:n_bits]
        weight = (bits.float() * 2 - 1) * _sign_size(self.settings)
        self.register_buffer('weight', weight.view(self.settings.code_dim, size), persistent=False)

    def set_extra_state(self, state: Tensor) -> None:
        """Adopt the seed of a stored generator and rebuild its signs.

        Raises:
            CSGError: a setting other than the seed differs, or the seed is missing.
        """
        super().set_extra_state(state)
        seed, like = read_signature(state)['seed'], self.weight
        if seed != self.settings.seed:
            self.settings = Settings.from_dict({**self.settings.to_dict(), 'seed': seed})
        # Also for the same seed: state dicts do not hold the signs, and ``to_empty`` discards them.
        self._rebuild_signs()
        self.weight = self.weight.to(like.dtype if like.is_meta else like)


def _sign_size(settings: Settings) -> float:
    return row_length(settings) / math.sqrt(math.prod(settings.slice_shape))
