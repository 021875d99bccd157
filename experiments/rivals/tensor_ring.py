"""Slices as tensor rings."""

import math
from functools import reduce

import torch
from torch import Tensor
from torch.nn import functional as F

from csg_seg.generators.lengths import row_length
from csg_seg.generators.linear import Generator


class TensorRingGenerator(Generator):
    """Slices as tensor rings over shared basis tensors.

    Obukhov et al., "T-Basis: a Compact Representation for Neural Networks", ICML
    2020. The index of a slice's value, written with ``K = settings.cores`` digits in
    base ``mode``, picks one matrix of each core by its digits ``i_1 ... i_K``:
    ``value = trace(C_1[i_1] ... C_K[i_K])``, ``C_k = scale * sum_b code[k, b] * weight[b]``.
    Indices from the slice's size on are cropped.

    Not carried over: there a ring makes a layer's whole weight, a digit stands for
    an output and an input channel's digit together, and rank adapters (``rank``
    factors for each core, stored beside the coefficients) scale the cores.

    A product of cores leaves its start free but for the product's size. Codes and
    basis start so that both keep the linear generator's pace: see :meth:`_scale`.

    Attributes:
        weight: ``(basis tensors, rank, mode, rank)``; their number is ``code_dim / K``.
    """

    is_product = False

    def _draw_weight(self, rng: torch.Generator) -> None:
        rank, mode, cores = self._ring()
        weight = torch.empty(self.settings.code_dim // cores, rank, mode, rank, device='cpu')
        std = cores * row_length(self.settings) / (rank * math.sqrt(mode))
        self.weight = self._parameter(weight.normal_(mean=0.0, std=std, generator=rng))

    def _ring(self) -> tuple[int, int, int]:
        rank, mode = self.settings.rank, self.settings.mode
        assert rank is not None and mode is not None
        return rank, mode, self.settings.cores

    def _scale(self) -> float:
        """Return the fixed factor on codes that sets the pace of learning.

        Let slices of ``size`` values have std ``s``, codes ``c``, the entries of ``B`` basis
        tensors ``t``. The slice's derivative by an entry of its code has the squared
        length ``size * s^2 / (B * c^2)``, by an entry of the basis
        ``K * size * s^2 / (B * rank^2 * mode * t^2)``. The first is the square of
        :func:`row_length`, the second what it is for a linear generator of that
        code length, if ``c = s * sqrt(size / B) / row_length`` and a basis tensor is
        ``K * row_length`` long; the factor follows from ``s = (scale * c * t * sqrt(B * rank))^K``.
        ``s`` is that of a layer as wide as a slice; codes of wider layers, whose
        weights are smaller, move less.
        """
        rank, mode, cores = self._ring()
        s_out, _, *kernel = self.settings.slice_shape
        weight_std = math.sqrt(2.0 / (s_out * math.prod(kernel)))
        size = math.prod(self.settings.slice_shape)
        return math.sqrt(rank * mode / size) / cores * weight_std ** (1 / cores - 1)

    def is_linear(self) -> bool:
        """Return False: a slice is a product of its code's parts."""
        return False

    def forward(self, code: Tensor) -> Tensor:
        """Map codes ``(n, code_dim)`` to slices ``(n, s_out, s_in, kh, kw)``."""
        cores, size = self.settings.cores, math.prod(self.settings.slice_shape)
        rank, mode, _ = self._ring()
        basis = self.weight.flatten(1)
        # Products rather than einsum, and sizes from the settings: TorchScript's ONNX has no einsum before
        # opset 12, and rounds towards zero what is computed with a tensor's shape.
        ring = [(part @ basis).view(-1, rank, mode, rank) for part in (code * self._scale()).chunk(cores, dim=1)]
        left, right = reduce(_merge, ring[: cores // 2]), reduce(_merge, ring[cores // 2 :])
        # Cropped as far as can be before the largest product.
        left = left[:, :, : -(-size // mode ** (cores - cores // 2))]
        values = left.transpose(1, 2).flatten(2) @ right.permute(0, 3, 1, 2).flatten(1, 2)
        return values.flatten(1)[:, :size].reshape(-1, *self.settings.slice_shape)

    def code_std(self, weight_std: float) -> float:
        """Return the std of zero-mean codes whose slices have the given std.

        A value sums products of ``K`` independent coefficients: its variance goes
        with the ``K``-th power of theirs.
        """
        return (weight_std / math.sqrt(self._mean_square())) ** (1 / self.settings.cores) / self._scale()

    def draw_code(self, n: int, *, weight_std: float, rng: torch.Generator) -> Tensor:
        """Draw start codes ``(n, code_dim)`` on the CPU, whose slices have the given std.

        The coefficients of each core have one length. If it varied, a product of
        ``K`` lengths would leave a few slices far above all others.
        """
        cores = self.settings.cores
        code = torch.empty(n, cores, self.settings.code_dim // cores, device='cpu')
        directions = F.normalize(code.normal_(mean=0.0, std=1.0, generator=rng), dim=2)
        return directions.flatten(1) * (self.code_std(weight_std) * math.sqrt(code.shape[2]))

    def _mean_square(self) -> float:
        """Return the mean square of a slice's values for coefficients of unit variance.

        That of one value is ``trace(M[i_1] ... M[i_K])``, ``M[i] = sum_b T_b[i] (x) T_b[i]``; the sum
        over all indices below the slice's size is taken digit by digit, the last one first.
        """
        # float64: the powers of the cores span many magnitudes.
        basis = self.weight.detach().double()
        by_digit = torch.einsum('bpiq,bsit->ipsqt', basis, basis).flatten(3).flatten(1, 2)
        size, mode = math.prod(self.settings.slice_shape), len(by_digit)
        up_to_last = every = torch.eye(by_digit.shape[1], dtype=torch.float64, device=basis.device)
        for place in range(self.settings.cores):
            digit = (size - 1) // mode**place % mode
            up_to_last = by_digit[:digit].sum(dim=0) @ every + by_digit[digit] @ up_to_last
            every = by_digit.sum(dim=0) @ every
        return up_to_last.trace().item() / size


def _merge(left: Tensor, right: Tensor) -> Tensor:
    """Merge two cores ``(n, p, i, q)`` and ``(n, q, j, r)`` into one ``(n, p, i * j, r)``."""
    merged = left.flatten(1, 2) @ right.flatten(2, 3)
    return merged.view(left.shape[0], left.shape[1], -1, right.shape[3])
