"""A generator of tensor rings: ``csg=dict(generator='tensor_ring', rank=18, code_dim=52, ...)``."""

import math
from functools import reduce

import torch
from torch import Tensor
from torch.nn import functional as F

from csg_seg import register_generator
from csg_seg.errors import CSGError
from csg_seg.generators.lengths import row_length
from csg_seg.generators.linear import Generator
from csg_seg.generators.registry import Option
from csg_seg.generators.settings import Settings


@register_generator('tensor_ring')
class TensorRingGenerator(Generator):
    """Slices as tensor rings over shared basis tensors.

    Obukhov et al., "T-Basis: a Compact Representation for Neural Networks", ICML
    2020. The index of a slice's value is written in base ``mode``, with ``K`` digits
    ``i_1 ... i_K``. Each digit picks one matrix of its core:
    ``value = trace(C_1[i_1] ... C_K[i_K])``, ``C_k = scale * sum_b code[k, b] * weight[b]``.
    Indices beyond the slice's size are cropped. ``K``, the number of cores, is the
    smallest that reaches every value.

    Differences from the paper: there, a ring makes a layer's whole weight, each digit
    combines a digit of the output channel with one of the input channel, and rank
    adapters (``rank`` factors for each core, stored beside the coefficients) scale the cores.

    The variance of a product determines only the product of its factors' variances.
    We choose them so that codes and basis learn as fast as with the linear generator;
    see :meth:`_scale`.

    Attributes:
        weight: ``(code_dim / K, rank, mode, rank)``, the basis tensors.
    """

    OPTIONS = {'rank': Option(minimum=1), 'mode': Option(minimum=2, default=4)}

    @classmethod
    def check_settings(cls, settings: Settings) -> None:
        """Require a code of equal parts, one for each core."""
        code_dim, mode, size = settings.code_dim, settings.options['mode'], math.prod(settings.slice_shape)
        if mode >= size:
            raise CSGError(f'mode must be less than the {size} values of a slice; got {mode}')
        cores = count_cores(settings)
        if code_dim % cores:
            below = max(code_dim // cores, 1) * cores
            raise CSGError(
                f'a tensor ring of mode {mode} makes {size} values with {cores} cores, so code_dim must be '
                f'a multiple of {cores}, such as {below} or {below + cores}; got {code_dim}'
            )

    def draw_weight(self, rng: torch.Generator) -> None:
        """Draw the basis tensors."""
        rank, mode, cores = self._ring()
        weight = torch.empty(self.settings.code_dim // cores, rank, mode, rank, device='cpu')
        std = cores * row_length(self.settings) / (rank * math.sqrt(mode))
        self.weight = self.new_parameter(weight.normal_(mean=0.0, std=std, generator=rng))

    def _ring(self) -> tuple[int, int, int]:
        return self.settings.options['rank'], self.settings.options['mode'], count_cores(self.settings)

    def _scale(self) -> float:
        """Return the fixed factor on codes that sets the learning speed.

        Let ``s`` be the std of slices of ``size`` values, ``c`` that of codes, and ``t`` that
        of the entries of ``B`` basis tensors. The derivative of a slice with respect to
        an entry of its code has the squared norm ``size * s^2 / (B * c^2)``; with respect
        to an entry of the basis it is ``K * size * s^2 / (B * rank^2 * mode * t^2)``. They
        match a linear generator with the same ``code_dim`` if
        ``c = s * sqrt(size / B) / row_length`` and the norm of a basis tensor is
        ``K * row_length``. The factor follows from ``s = (scale * c * t * sqrt(B * rank))^K``.
        Here ``s`` is the std for a layer as wide as a slice. Codes of wider layers,
        which have smaller weights, move less.
        """
        rank, mode, cores = self._ring()
        s_out, _, *kernel = self.settings.slice_shape
        weight_std = math.sqrt(2.0 / (s_out * math.prod(kernel)))
        size = math.prod(self.settings.slice_shape)
        return math.sqrt(rank * mode / size) / cores * weight_std ** (1 / cores - 1)

    def forward(self, code: Tensor) -> Tensor:
        """Map codes ``(n, code_dim)`` to slices ``(n, s_out, s_in, kh, kw)``."""
        rank, mode, cores = self._ring()
        size = math.prod(self.settings.slice_shape)
        basis = self.weight.flatten(1)
        # No einsum, which the TorchScript exporter to ONNX lacks before opset 12. Sizes come from the settings,
        # because that exporter rounds integer division of tensor shapes towards zero.
        ring = [(part @ basis).view(-1, rank, mode, rank) for part in (code * self._scale()).chunk(cores, dim=1)]
        left, right = reduce(_merge, ring[: cores // 2]), reduce(_merge, ring[cores // 2 :])
        # Crop as far as possible before the largest matmul.
        left = left[:, :, : -(-size // mode ** (cores - cores // 2))]
        values = left.transpose(1, 2).flatten(2) @ right.permute(0, 3, 1, 2).flatten(1, 2)
        return values.flatten(1)[:, :size].reshape(-1, *self.settings.slice_shape)

    def code_std(self, weight_std: float) -> float:
        """Return the std of zero-mean codes whose slices have the given std.

        A value is a sum of products of ``K`` independent coefficients, so its variance is
        proportional to the ``K``-th power of theirs.
        """
        return (weight_std / math.sqrt(self._mean_square())) ** (1 / count_cores(self.settings)) / self._scale()

    def draw_code(self, n: int, *, weight_std: float, rng: torch.Generator) -> Tensor:
        """Draw start codes ``(n, code_dim)`` on the CPU; their slices have the given std.

        The coefficients of all cores have the same norm. If it varied, a product of
        ``K`` norms would make a few slices much larger than the others.
        """
        cores = count_cores(self.settings)
        code = torch.empty(n, cores, self.settings.code_dim // cores, device='cpu')
        directions = F.normalize(code.normal_(mean=0.0, std=1.0, generator=rng), dim=2)
        return directions.flatten(1) * (self.code_std(weight_std) * math.sqrt(code.shape[2]))

    def _mean_square(self) -> float:
        """Return the mean square of a slice's values for coefficients of unit variance.

        For one value it is ``trace(M[i_1] ... M[i_K])``, ``M[i] = sum_b T_b[i] (x) T_b[i]``. We sum
        over all indices below the slice's size digit by digit, starting with the last.
        """
        # float64: the powers of the cores span many magnitudes.
        basis = self.weight.detach().double()
        by_digit = torch.einsum('bpiq,bsit->ipsqt', basis, basis).flatten(3).flatten(1, 2)
        size, mode = math.prod(self.settings.slice_shape), len(by_digit)
        up_to_last = every = torch.eye(by_digit.shape[1], dtype=torch.float64, device=basis.device)
        for place in range(count_cores(self.settings)):
            digit = (size - 1) // mode**place % mode
            up_to_last = by_digit[:digit].sum(dim=0) @ every + by_digit[digit] @ up_to_last
            every = by_digit.sum(dim=0) @ every
        return up_to_last.trace().item() / size


def count_cores(settings: Settings) -> int:
    """Return the smallest number of cores whose indices reach every value of a slice."""
    cores = 1
    while settings.options['mode'] ** cores < math.prod(settings.slice_shape):
        cores += 1
    return cores


def _merge(left: Tensor, right: Tensor) -> Tensor:
    """Merge two cores ``(n, p, i, q)`` and ``(n, q, j, r)`` into one ``(n, p, i * j, r)``."""
    merged = left.flatten(1, 2) @ right.flatten(2, 3)
    return merged.view(left.shape[0], left.shape[1], -1, right.shape[3])
