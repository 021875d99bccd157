"""The generator with one hidden layer."""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from .kinds import Option
from .linear import Generator
from .registry import register_generator


@register_generator('mlp')
class MLPGenerator(Generator):
    """A non-linear generator: ``slice = [code, relu(code @ hidden_weight + hidden_bias)] @ weight``.

    Omidvar et al., AISTATS 2021, name it as future work. The hidden units' rows of
    ``weight`` start at zero, so training starts from a linear generator, with its
    variance and learning speed. :meth:`Generator.set_linear` also zeroes them.
    A generator that is frozen at this point stays linear.

    The hidden layer's scale keeps those rows from learning too fast: relu has a
    positive mean, so all slices share what the hidden units learn, and their steps
    add up. For codes of unit variance and nearly orthogonal columns of length ``l``,
    ``E[h h^T]`` is ``l^2 / 2`` on its diagonal and ``l^2 / (2 pi)`` elsewhere (Cho and Saul,
    NeurIPS 2009). Columns of ``l^2 = 2 pi / (hidden + pi - 1)`` make its largest
    eigenvalue 1, as for the codes themselves.

    Attributes:
        weight: ``(code_dim + hidden, s_out * s_in * kh * kw)``.
        hidden_weight: ``(code_dim, hidden)``.
        hidden_bias: ``(hidden,)``, initially zero.
    """

    OPTIONS = {'hidden': Option(minimum=1)}
    has_linear_part = True

    def draw_weight(self, rng: torch.Generator) -> None:
        """Draw the linear generator of the same seed, then the hidden layer."""
        super().draw_weight(rng)
        code_dim, hidden = self.settings.code_dim, self.settings.options['hidden']
        columns = torch.empty(code_dim, hidden, device='cpu')
        length = math.sqrt(2 * math.pi / (hidden + math.pi - 1))
        columns.normal_(mean=0.0, std=length / math.sqrt(code_dim), generator=rng)
        self.weight = self.new_parameter(F.pad(self.weight.detach(), (0, 0, 0, hidden)))
        self.hidden_weight = self.new_parameter(columns)
        self.hidden_bias = self.new_parameter(torch.zeros(hidden, device='cpu'))

    def is_linear(self) -> bool:
        """Say whether the hidden units still have no effect."""
        return not self.weight[self.settings.code_dim :].any()

    def forward(self, code: Tensor) -> Tensor:
        """Map codes ``(n, code_dim)`` to slices ``(n, s_out, s_in, kh, kw)``."""
        hidden = F.relu(code @ self.hidden_weight + self.hidden_bias)
        return super().forward(torch.cat((code, hidden), dim=1))
