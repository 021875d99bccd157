"""A generator with one hidden layer."""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from .linear import Generator


class MLPGenerator(Generator):
    """A non-linear generator: ``slice = [code, relu(code @ hidden_weight + hidden_bias)] @ weight``.

    The future work that Omidvar et al., AISTATS 2021, name. The hidden units' rows
    of ``weight`` start at zero: the start is a linear generator, at its variance and
    with its pace of learning, and so is any that :meth:`Generator.set_linear` made.
    Frozen there, it stays one: freeze a trained one only.

    Steps on those rows must not run away: relu has a positive mean, so all slices
    share what the hidden units learn, and the units' paces add up. For codes of
    unit variance and nearly orthogonal columns of length ``l``, ``E[h h^T]`` holds
    ``l^2 / 2`` on its diagonal and ``l^2 / (2 pi)`` elsewhere (Cho and Saul, NeurIPS 2009).
    Its largest eigenvalue is 1, that of the codes themselves, for
    ``l^2 = 2 pi / (hidden + pi - 1)``, at which the columns start.

    Attributes:
        weight: ``(code_dim + hidden, s_out * s_in * kh * kw)``.
        hidden_weight: ``(code_dim, hidden)``.
        hidden_bias: ``(hidden,)``, zero at the start.
    """

    is_product = False

    def _draw_weight(self, rng: torch.Generator) -> None:
        super()._draw_weight(rng)
        code_dim, hidden = self.settings.code_dim, self.settings.hidden
        assert hidden is not None
        columns = torch.empty(code_dim, hidden, device='cpu')
        length = math.sqrt(2 * math.pi / (hidden + math.pi - 1))
        columns.normal_(mean=0.0, std=length / math.sqrt(code_dim), generator=rng)
        self.weight = self._parameter(F.pad(self.weight.detach(), (0, 0, 0, hidden)))
        self.hidden_weight = self._parameter(columns)
        self.hidden_bias = self._parameter(torch.zeros(hidden, device='cpu'))

    def is_linear(self) -> bool:
        """Say whether the hidden units give nothing yet."""
        return not self.weight[self.settings.code_dim :].any()

    def forward(self, code: Tensor) -> Tensor:
        """Map codes ``(n, code_dim)`` to slices ``(n, s_out, s_in, kh, kw)``."""
        hidden = F.relu(code @ self.hidden_weight + self.hidden_bias)
        return super().forward(torch.cat((code, hidden), dim=1))
