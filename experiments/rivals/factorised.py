"""Low-rank convs of TensorLy-Torch: ``model=dict(type='FactorisedModel', method='tucker', params=1371702, ...)``."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from mmengine.registry import MODELS
from torch import nn

from csg_seg.errors import CSGError
from csg_seg.layers.conv import kaiming_std

from .separable import find_replaceable, replace_convs

try:
    from tensorly.cp_tensor import validate_cp_rank
    from tensorly.tucker_tensor import validate_tucker_rank
    from tltorch import FactorizedConv
except ImportError:
    raise CSGError("low-rank convs need tensorly-torch; install the extra: pip install -e '.[dev]'") from None

SPATIAL = (2, 3)  # the modes of height and width in a conv's weight


@MODELS.register_module()
def FactorisedModel(
    base_type: str,
    method: str,
    params: int,
    pointwise: float | None = None,
    implementation: str = 'factorized',
    **base: Any,
) -> nn.Module:
    """Build the model of the base config and replace its 3x3 convs, except the first, by :class:`LowRankConv`.

    A layer gets the rank that TensorLy derives from a fraction of its parameters. The fraction of the 3x3 convs is
    chosen so that the whole model has the wanted size.

    Args:
        base_type: registered name of the model to build.
        method: 'tucker' or 'cp'.
        params: number of parameters of the whole model, met within 3 %.
        pointwise: fraction for 1x1 convs, except those that predict the classes; None leaves them dense.
        implementation: of TensorLy-Torch: 'reconstructed' makes the weight before each conv, 'factorized' applies one
            conv after the other.
        base: arguments of ``base_type``.

    Raises:
        CSGError: the method is unknown, the model has no conv to replace, or no rank gives the wanted size.
    """
    if method not in RANK_RULES:
        raise CSGError(f'FactorisedModel: unknown method {method!r}; use {" or ".join(map(repr, RANK_RULES))}')
    model = MODELS.build(dict(type=base_type, **base))
    if pointwise is not None:
        _replace(model, (1, 1), method, float(pointwise), implementation)
    shapes = [tuple(conv.weight.shape) for conv in find_replaceable(model, kernels={(3, 3)}).values()]
    others = sum(each.numel() for each in model.parameters()) - sum(map(math.prod, shapes))
    _replace(model, (3, 3), method, _choose_fraction(method, shapes, others, params), implementation)
    return model


def _replace(model: nn.Module, kernel: tuple[int, int], method: str, fraction: float, implementation: str) -> None:
    def make(conv: nn.Conv2d) -> LowRankConv:
        rank = RANK_RULES[method](conv.weight.shape, fraction)
        return LowRankConv(conv, method=method, rank=rank, implementation=implementation)

    replace_convs(model, make, kernels={kernel}, exclude='*.conv_seg')


class LowRankConv(FactorizedConv):
    """A conv whose weight is a Tucker or CP decomposition.

    Tucker, Kim et al., ICLR 2016: ``weight = core x_1 U_out x_2 U_in`` with a core of ``(r_out, r_in, kh, kw)``. CP,
    Lebedev et al., ICLR 2015: ``weight = sum_r l_r a_r (x) b_r (x) c_r (x) d_r``. The library stores square factors
    of the Tucker's kernel modes, too.

    Args:
        conv: the conv that it replaces.
        method: 'tucker' or 'cp'.
        rank: ranks of all modes, or the number of terms of CP.
        implementation: 'reconstructed' or 'factorized'.
    """

    def __init__(self, conv: nn.Conv2d, *, method: str, rank: Any, implementation: str = 'factorized'):
        super().__init__(
            conv.in_channels,
            conv.out_channels,
            conv.kernel_size,
            stride=conv.stride,
            padding=conv.padding,
            dilation=conv.dilation,
            bias=conv.bias is not None,
            factorization=method,
            rank=rank,
            implementation=implementation,
        )
        self.start_std = kaiming_std(conv)
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """Draw start values at Kaiming variance; mmengine calls it after the initialisers of the config.

        The library's own start has this variance on average over draws, but not for each draw, and the few entries
        of the kernel modes learn hundreds of times faster than the others. Therefore we draw what a decomposition
        returns: orthonormal factors and a core for Tucker, terms of equal norm for CP. Their scales are such that a
        gradient step on each part moves the weight about as far.
        """
        if self.factorization == 'tucker':
            self.weight.core.normal_()
            for factor in self.weight.factors:
                nn.init.orthogonal_(factor)
            # With factors of squared norm a per column, the weight moves a ** 2 times as far as a dense one for a step
            # on the core, and energy / (a * rank) times as far for a step on a factor.
            energy = self.start_std**2 * math.prod(self.shape)
            columns = (energy / math.sqrt(self.rank[0] * self.rank[1])) ** (1 / 3)
            for factor in self.weight.factors[:2]:
                factor.mul_(math.sqrt(columns))
            scaled = [self.weight.core]
        else:
            self.weight.weights.fill_(1)
            for factor in self.weight.factors:
                factor.normal_().div_(factor.norm(dim=0))
            scaled = [self.weight.weights, *self.weight.factors]
        ratio = self.start_std / self.weight.to_tensor().square().mean().sqrt().item()
        for tensor in scaled:
            tensor.mul_(ratio ** (1 / len(scaled)))
        if self.bias is not None:
            nn.init.zeros_(self.bias)


def tucker_ranks(shape: Sequence[int], fraction: float) -> list[int]:
    """Return the ranks of a Tucker decomposition with a fraction of the parameters, the kernel modes undecomposed."""
    return validate_tucker_rank(tuple(shape), fraction, fixed_modes=SPATIAL)


def cp_rank(shape: Sequence[int], fraction: float) -> int:
    """Return the number of terms of a CP decomposition with a fraction of the parameters."""
    return max(validate_cp_rank(tuple(shape), fraction), 1)


RANK_RULES: Mapping[str, Callable[[Sequence[int], float], Any]] = {'tucker': tucker_ranks, 'cp': cp_rank}


def count_low_rank(shape: Sequence[int], rank: Sequence[int] | int) -> int:
    """Return the number of parameters of a decomposition: of Tucker for a list of ranks, of CP for one."""
    if isinstance(rank, int):
        return rank * (1 + sum(shape))
    return math.prod(rank) + sum(size * each for size, each in zip(shape, rank, strict=True))


def _choose_fraction(method: str, shapes: Sequence[tuple[int, ...]], others: int, params: int) -> float:
    """Return the fraction of each weight's parameters with which a model comes closest to a size.

    Args:
        method: 'tucker' or 'cp'.
        shapes: of the weights.
        others: number of the other parameters.
        params: wanted number of all parameters.

    Raises:
        CSGError: the closest size is more than 3 % off.
    """

    def size(fraction: float) -> int:
        return others + sum(count_low_rank(shape, RANK_RULES[method](shape, fraction)) for shape in shapes)

    low, high = 1e-6, 1.0
    smallest = size(low)
    for _ in range(40):  # bisection: the size grows with the fraction, in steps
        middle = (low + high) / 2
        low, high = (middle, high) if size(middle) < params else (low, middle)
    best = min((low, high), key=lambda fraction: abs(size(fraction) - params))
    if abs(size(best) - params) > 0.03 * params:
        raise CSGError(
            f'FactorisedModel: no rank of {method} gives {params:,} parameters within 3 %; the smallest model has '
            f'{smallest:,}, so raise params or lower pointwise, the fraction of 1x1 convs'
        )
    return best
