"""A generator of points on a frozen manifold: ``csg=dict(generator='manifold', code_dim=10, hidden=256, ...)``."""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from csg_seg import register_generator
from csg_seg.errors import CSGError
from csg_seg.generators.lengths import row_length
from csg_seg.generators.registry import Option
from csg_seg.generators.settings import Settings

from .random_basis import SeededGenerator, seeded_normal

# Output channels of a layer whose codes all learn at the pace of a linear generator.
REFERENCE_WIDTH = 256


@register_generator('manifold')
class ManifoldGenerator(SeededGenerator):
    """Slices as an amplitude times a frozen random sine network of a few inputs.

    Thrash et al., "MCNC: Manifold-Constrained Reparameterization for Neural Compression", ICLR 2025. A code is the
    amplitude and ``code_dim - 1`` inputs: ``slice = amplitude * direction``, ``direction`` is the output of
    ``sin(sin(inputs @ input_weight) @ hidden_weight) @ weight``, divided by its norm. The network is made from a seed;
    only codes are learned.

    Differences from the paper: there, segments follow the order of a layer's values and are added to start values
    that a seed gives. Here segments are the slices of a grid, without start values, so the inputs start at random; and
    two fixed factors on the code make SGD with the recipe of a dense network work, see :meth:`_input_scale`.

    Attributes:
        input_weight: ``(code_dim - 1, hidden)``; ``frequency`` is the std of the first sines' arguments.
        hidden_weight: ``(hidden, hidden)``, whose products have about unit variance.
        weight: ``(hidden, s_out * s_in * kh * kw)``.
    """

    OPTIONS = {'hidden': Option(minimum=1, default=256), 'frequency': Option(minimum=1, default=1)}
    input_weight: Tensor
    hidden_weight: Tensor

    @classmethod
    def check_settings(cls, settings: Settings) -> None:
        """Require an amplitude and at least one input."""
        if settings.code_dim < 2:
            raise CSGError(
                f'a code of manifold is an amplitude and inputs, so at least 2 values; got {settings.code_dim}'
            )

    def make_values(self) -> dict[str, Tensor]:
        """Return the weights of the sine network."""
        inputs, hidden, seed = self.settings.code_dim - 1, self.settings.options['hidden'], self.settings.seed
        size = math.prod(self.settings.slice_shape)
        return {
            'input_weight': seeded_normal('input', (inputs, hidden), seed) * self._frequency() / math.sqrt(inputs),
            # The mean square of a sine is about a half.
            'hidden_weight': seeded_normal('hidden', (hidden, hidden), seed) * math.sqrt(2 / hidden),
            'weight': seeded_normal('weight', (hidden, size), seed) * math.sqrt(2 / hidden),
        }

    def _frequency(self) -> float:
        return self.settings.options['frequency']

    def _input_scale(self) -> float:
        """Return the fixed factor on inputs that sets the learning speed.

        A unit of the amplitude makes a slice of norm :func:`row_length`, so the amplitude learns as a code of a linear
        generator does. An input moves the unit direction at the rate ``turn``, and the slice at ``norm * factor *
        turn``. The factor makes this :func:`row_length` too, for a layer of :data:`REFERENCE_WIDTH` output channels;
        narrower layers, whose weights are larger, learn faster.
        """
        size, (_, _, *kernel) = math.prod(self.settings.slice_shape), self.settings.slice_shape
        norm = math.sqrt(size * 2.0 / (REFERENCE_WIDTH * math.prod(kernel)))
        return row_length(self.settings) / (norm * self._turn())

    def _turn(self) -> float:
        """Return how far a step of one input turns the direction: the root mean square, in expectation.

        The arguments of sines are nearly Gaussian, of variance ``v`` in the first layer and ``w`` in the second. The
        derivative of a sine is a cosine, whose mean square is ``(1 + exp(-2 v)) / 2``; that of a sine is
        ``(1 - exp(-2 v)) / 2``.
        """
        v = self._frequency() ** 2
        w = 1 - math.exp(-2 * v)
        second = 1 - math.exp(-2 * w)
        # Squared norms of one output, and of its derivative with respect to one input of variance one.
        output, moved = second, v / (self.settings.code_dim - 1) * (1 + math.exp(-2 * v)) * (1 + math.exp(-2 * w))
        return math.sqrt(moved / output)

    def forward(self, code: Tensor) -> Tensor:
        """Map codes ``(n, code_dim)`` to slices ``(n, s_out, s_in, kh, kw)``."""
        inputs = code[:, 1:] * self._input_scale()
        sines = torch.sin(torch.sin(inputs @ self.input_weight) @ self.hidden_weight)
        directions = F.normalize(sines @ self.weight, dim=1)
        amplitudes = code[:, :1] * row_length(self.settings)
        return (amplitudes * directions).view(-1, *self.settings.slice_shape)

    def code_std(self, weight_std: float) -> float:
        """Return the start amplitude of slices that have the given std."""
        return weight_std * math.sqrt(math.prod(self.settings.slice_shape)) / row_length(self.settings)

    def draw_code(self, n: int, *, weight_std: float, rng: torch.Generator) -> Tensor:
        """Draw start codes ``(n, code_dim)`` on the CPU; their slices have the given std.

        All amplitudes of a layer are equal; inputs, before they are scaled, have unit variance.
        """
        inputs = torch.empty(n, self.settings.code_dim - 1, device='cpu')
        inputs.normal_(mean=0.0, std=1 / self._input_scale(), generator=rng)
        return torch.cat((torch.full((n, 1), self.code_std(weight_std), device='cpu'), inputs), dim=1)
