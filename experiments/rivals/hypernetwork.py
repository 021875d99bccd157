"""A generator of two linear layers: ``csg=dict(generator='hypernetwork', hidden=64, code_dim=64, ...)``."""

import math

import torch
from torch import Tensor

from csg_seg import register_generator
from csg_seg.generators.lengths import row_length
from csg_seg.generators.linear import Generator
from csg_seg.generators.registry import Option


@register_generator('hypernetwork')
class HypernetworkGenerator(Generator):
    """The static hypernetwork: an embedding through two linear layers.

    Ha, Dai and Le, "HyperNetworks", ICLR 2017, section 3.1. The code is the embedding ``z`` of a block of a weight. The
    first layer maps it to one vector for each input channel ``i`` of the block, the second layer, shared by all input
    channels, maps that vector to the channel's values for all output channels: ``a_i = z @ hidden_weight[i] +
    hidden_bias[i]``, ``block[:, i] = a_i @ weight + bias``. Larger layers are made of several blocks, as in the paper.
    There ``hidden``, the length of ``a_i``, equals ``code_dim``.

    Differences from the paper: blocks at the edge of a weight are cropped, biases have a fixed factor, and the start
    values are ours. The authors' example starts both layers at a std of 0.01. Here they are such that SGD with the
    recipe of a dense network works; see :meth:`draw_weight`.

    Attributes:
        weight: ``(hidden, s_out * kh * kw)``.
        bias: ``(s_out * kh * kw,)``, initially zero.
        hidden_weight: ``(s_in, code_dim, hidden)``.
        hidden_bias: ``(s_in, 1, hidden)``, initially zero.
    """

    OPTIONS = {'hidden': Option(minimum=1)}

    def draw_weight(self, rng: torch.Generator) -> None:
        """Draw both layers.

        An entry of a code moves its slice by the product of the layers, whose rows have :func:`row_length`. Rows of
        ``weight`` are as long as needed for ``weight.T @ weight`` to be the identity in expectation, so the first
        layer learns as fast as a linear generator.
        """
        _, s_in, *_ = self.settings.slice_shape
        code_dim, hidden = self.settings.code_dim, self.settings.options['hidden']
        columns = math.prod(self.settings.slice_shape) // s_in
        weight = torch.empty(hidden, columns, device='cpu')
        hidden_weight = torch.empty(s_in, code_dim, hidden, device='cpu')
        weight.normal_(mean=0.0, std=1 / math.sqrt(hidden), generator=rng)
        hidden_weight.normal_(mean=0.0, std=self._hidden_std(), generator=rng)
        self.weight = self.new_parameter(weight)
        self.bias = self.new_parameter(torch.zeros(columns, device='cpu'))
        self.hidden_weight = self.new_parameter(hidden_weight)
        self.hidden_bias = self.new_parameter(torch.zeros(s_in, 1, hidden, device='cpu'))

    def _hidden_std(self) -> float:
        return row_length(self.settings) / math.sqrt(math.prod(self.settings.slice_shape))

    def forward(self, code: Tensor) -> Tensor:
        """Map codes ``(n, code_dim)`` to slices ``(n, s_out, s_in, kh, kw)``."""
        s_out, s_in, *kernel = self.settings.slice_shape
        # The gradients of a bias add up over all slices. With these factors, it is one more entry of its layer's input:
        # codes have about unit length, so their entries are 1 / sqrt(code_dim).
        hidden_bias = self.hidden_bias / math.sqrt(self.settings.code_dim)
        hidden = code @ self.hidden_weight + hidden_bias
        values = hidden @ self.weight + self.bias * self._hidden_std()
        return values.view(s_in, -1, s_out, *kernel).movedim(0, 2)

    def code_std(self, weight_std: float) -> float:
        """Return the std of zero-mean codes whose slices, without the biases, have the given std."""
        # The squared norm of all derivatives of values with respect to entries of the code.
        both = self.hidden_weight.detach().double().flatten(0, 1), self.weight.detach().double()
        squared_norm = (both[0].T @ both[0] * (both[1] @ both[1].T)).sum().item()
        return weight_std * math.sqrt(math.prod(self.settings.slice_shape) / squared_norm)
