"""A linear generator that learns more slowly than its codes: ``csg=dict(generator='long_rows', ...)``."""

import torch

from csg_seg import register_generator
from csg_seg.generators.linear import Generator

STRETCH = 1.5


@register_generator('long_rows')
class LongRows(Generator):
    """The linear generator with rows that start longer, and codes that start shorter by the same factor.

    The first weights are those of the linear generator. A gradient step on the codes moves them ``STRETCH**2`` times
    as far, and a step on the generator that much less far.
    """

    def draw_weight(self, rng: torch.Generator) -> None:
        """Stretch the linear generator's start values."""
        super().draw_weight(rng)
        with torch.no_grad():
            self.weight.mul_(STRETCH)
