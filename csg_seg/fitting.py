"""Dense weights to a generator and codes: the start of training, not its end.

The linear generator with the smallest squared error is spanned by the first eigenvectors
of the slices' Gram matrix (a truncated SVD). Where slices hang over a weight's edge, their
cropped values are free, and alternating least squares over the others refines the result.
Generators that are not linear are fitted by gradient descent.
"""

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from csg_seg.errors import CSGError
from csg_seg.generators.lengths import row_length
from csg_seg.generators.linear import Generator
from csg_seg.generators.registry import build_generator
from csg_seg.generators.settings import Settings
from csg_seg.generators.slices import grid, split

# Eight more lower the squared error by 1 % on ResNet-20 and 0.4 % on ResNet-56, slices of 12x12, codes of 72.
ROUNDS = 8
STEPS = 300
# Adam's first step, as a share of a tensor's root mean square.
_PACE = 0.1


def gram(weights: Iterable[Tensor], settings: Settings) -> Tensor:
    """Return the Gram matrix of the slices of several weights, in float64.

    The squared error of the best linear generator of these slices is the sum of all
    eigenvalues but the ``code_dim`` largest.

    Args:
        weights: each ``(out, in, kh, kw)``.
        settings: ``slice_shape`` and ``layout`` are used.

    Returns:
        ``(size, size)``, where size is ``s_out * s_in * kh * kw``.
    """
    size = math.prod(settings.slice_shape)
    total = torch.zeros(size, size, dtype=torch.float64, device='cpu')
    for weight in weights:
        slices = _split(weight, settings)
        total.addmm_(slices.T, slices)
    return total


def fit_generator(generator: Generator, weights: Sequence[Tensor], *, keep: bool = False) -> list[Tensor]:
    """Fit a generator, in place, and codes to several weights.

    For a frozen generator only the codes are fitted.

    Args:
        generator: of any kind. Gradient descent fits a kind without a linear part, and the
            codes of a kept generator that is not linear; it fits the overhang as zeros.
        weights: each ``(out, in, kh, kw)``, finite.
        keep: leave the generator as it is even if it is not frozen.

    Returns:
        the code of each weight ``(rows * cols, code_dim)``, on the CPU in float64.

    Raises:
        CSGError: all weights are zero and need gradient descent.
    """
    settings = generator.settings
    keep = keep or settings.freeze_generator
    slices = torch.cat([_split(weight, settings) for weight in weights])
    has_best_fit = generator.is_linear() if keep else generator.has_linear_part
    if has_best_fit:
        code = _fit_linear(generator, slices, _overhangs([weight.shape for weight in weights], settings), keep)
    else:
        code = _descend(generator, slices.float(), keep)
    return list(code.split([math.prod(grid(weight.shape, settings.slice_shape)) for weight in weights]))


def _fit_linear(generator: Generator, slices: Tensor, overhangs: Sequence['_Overhang'], keep: bool) -> Tensor:
    settings = generator.settings
    if not keep:
        # With rows of this length, a fitted weight moves as far at each training step as a randomly initialised one.
        generator.set_linear(row_length(settings) * _nearest_basis(slices, overhangs, settings.code_dim))
    basis = generator.weight.detach()[: settings.code_dim].to('cpu', torch.float64)
    return _encode(slices, overhangs, basis)


@torch.enable_grad()
def _descend(generator: Generator, slices: Tensor, keep: bool) -> Tensor:
    """Fit codes ``(n, code_dim)``, and unless kept the generator, to slices ``(n, size)`` by gradient descent.

    Adam (Kingma and Ba, ICLR 2015) on the squared error of all slices at once, with cosine decay.
    """
    weight_std = _root_mean_square(slices)
    if weight_std == 0:
        raise CSGError('all slices are zero; leave this layer dense')
    # From the seed's start values, so that fitting twice gives the same result.
    rng = torch.Generator().manual_seed(generator.settings.seed)
    fitted = build_generator(generator.settings, rng)
    if keep:
        fitted.load_state_dict(generator.state_dict())
        fitted.requires_grad_(False)
    code = fitted.draw_code(len(slices), weight_std=weight_std, rng=rng).requires_grad_()
    groups = [{'params': [code], 'lr': _PACE * _root_mean_square(code)}]
    if not keep:
        groups.append({'params': list(fitted.parameters()), 'lr': _PACE * _root_mean_square(fitted.weight)})
    optimizer = torch.optim.Adam(groups)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    for _ in range(STEPS):
        # Relative, because Adam's epsilon is not.
        loss = (fitted(code).flatten(1) - slices).square().mean() / weight_std**2
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    generator.load_state_dict(fitted.state_dict())
    return code.detach().double()


def _root_mean_square(values: Tensor) -> float:
    return values.detach().double().square().mean().sqrt().item()


def _nearest_basis(slices: Tensor, overhangs: Sequence['_Overhang'], code_dim: int) -> Tensor:
    """Return orthonormal rows ``(code_dim, size)`` that span the best approximation of slices ``(n, size)``."""
    # The slices are float64; float32 would lose the tail of the spectrum.
    if len(slices) < slices.shape[1]:
        vectors = torch.linalg.svd(slices, full_matrices=False).Vh
    else:
        vectors = torch.linalg.eigh(slices.T @ slices).eigenvectors.T.flip(0)
    best = vectors[:code_dim]
    # If code_dim exceeds the number of slices, the remaining rows are zero.
    basis = torch.zeros(code_dim, slices.shape[1], dtype=torch.float64, device='cpu')
    basis[: len(best)] = best
    if not all(inside.all() for inside, _ in overhangs):
        for _ in range(ROUNDS):
            basis = _improve(basis, slices, overhangs)
        basis = torch.linalg.qr(basis.T).Q.T
    return basis


def _improve(basis: Tensor, slices: Tensor, overhangs: Sequence['_Overhang']) -> Tensor:
    """Return the best basis for the codes that are best for the given basis.

    This is least squares for each column. Columns cropped in the same slices share a normal matrix.
    """
    code = _encode(slices, overhangs, basis)
    squares = torch.stack([code[chosen].T @ code[chosen] for _, chosen in overhangs])
    # The overhang is zero in the slices.
    targets = code.T @ slices
    groups, group_of = torch.unique(torch.stack([inside for inside, _ in overhangs]), dim=1, return_inverse=True)
    improved = basis.clone()
    for index, present in enumerate(groups.T):
        columns = group_of == index
        improved[:, columns] = torch.linalg.pinv(squares[present].sum(0), hermitian=True) @ targets[:, columns]
    return improved


def _encode(slices: Tensor, overhangs: Sequence['_Overhang'], basis: Tensor) -> Tensor:
    """Return the codes ``(n, code_dim)`` that best approximate slices ``(n, size)`` where they are not cropped."""
    code = torch.empty(len(slices), len(basis), dtype=torch.float64, device='cpu')
    for inside, chosen in overhangs:
        # pinv, because a cropped slice may have fewer values than a code.
        code[chosen] = slices[chosen] @ torch.linalg.pinv(basis * inside)
    return code


# A mask of the values that are not cropped ``(size,)``, and the positions of the slices it applies to ``(n,)``.
_Overhang = tuple[Tensor, Tensor]


def _overhangs(weight_shapes: Iterable[Sequence[int]], settings: Settings) -> list[_Overhang]:
    """Group the slices of several weights by which of their values are cropped."""
    patterns: dict[tuple[bool, ...], list[int]] = {}
    position = 0
    for weight_shape in weight_shapes:
        kept = torch.ones(*weight_shape, dtype=torch.bool, device='cpu')
        inside = split(kept, settings.slice_shape, layout=settings.layout).flatten(1)
        # Most weights have no overhang: one entry for all their slices.
        whole = bool(inside.all())
        for row, count in [(inside[0], len(inside))] if whole else [(row, 1) for row in inside]:
            chosen = patterns.setdefault(tuple(row.tolist()), [])
            chosen.extend(range(position, position + count))
            position += count
    return [(torch.tensor(row, device='cpu'), torch.tensor(chosen, device='cpu')) for row, chosen in patterns.items()]


def _split(weight: Tensor, settings: Settings) -> Tensor:
    """Return a weight's slices ``(rows * cols, size)`` in float64, with zeros as overhang."""
    dense = weight.detach().to('cpu', torch.float64)
    return split(dense, settings.slice_shape, layout=settings.layout).flatten(1)
