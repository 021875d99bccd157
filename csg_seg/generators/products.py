"""Many codes times one weight, by one product."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn


class Products(torch.autograd.Function):
    """``code @ weight`` of many codes by one product.

    A code whose slices take no part gets no gradient, as if each had been multiplied
    alone. The inputs are parameters and kept as they are, past the hooks of saved
    tensors: activation checkpointing, which counts those, sees the same number
    whether a layer's slices were made within its part of the network or ahead of it.
    """

    @staticmethod
    def forward(ctx: Any, weight: Tensor, *codes: Tensor) -> tuple[Tensor, ...]:
        """Multiply codes ``(n, code_dim)`` each, and a weight ``(code_dim, size)``."""
        ctx.set_materialize_grads(False)
        ctx.weight, ctx.codes = weight, codes
        ctx.versions = weight._version, [code._version for code in codes]
        return (torch.cat(codes) @ weight).split([len(code) for code in codes])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        """Return the gradients of the weight and of each code.

        Raises:
            RuntimeError: an input was written to since, as torch says of tensors that it saves.
        """
        used = {position: each for position, each in enumerate(gradients) if each is not None}
        of_version, code_versions = ctx.versions
        changed = any(ctx.codes[position]._version != code_versions[position] for position in used)
        if (ctx.needs_input_grad[0] and changed) or (
            any(ctx.needs_input_grad[1:]) and ctx.weight._version != of_version
        ):
            raise RuntimeError(
                'a code or a generator was modified by an inplace operation between forward and backward pass'
            )
        of_weight: Tensor | None = None
        of_codes: dict[int, Tensor] = {}
        if used:
            codes = [ctx.codes[position] for position in used]
            with torch.autocast(ctx.weight.device.type, enabled=False):
                gradient = torch.cat(list(used.values()))
                if ctx.needs_input_grad[0]:
                    of_weight = torch.cat(codes).T @ gradient
                if any(ctx.needs_input_grad[1:]):
                    parts = (gradient @ ctx.weight.T).split([len(code) for code in codes])
                    of_codes = dict(zip(used, parts, strict=True))
        return of_weight, *(of_codes.get(position) for position in range(len(gradients)))


def is_recorded() -> bool:
    """Say whether what runs is compiled, traced or transformed, all of which know plain products best."""
    return (
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        # As torch.autograd.Function asks.
        or torch._C._are_functorch_transforms_active()  # type: ignore[attr-defined]
    )


def multiply(weight: Tensor, codes: Sequence[Tensor]) -> Sequence[Tensor]:
    """Return ``code @ weight`` of each code."""
    if is_recorded() or not all(type(code) is nn.Parameter for code in codes):
        return [code @ weight for code in codes]
    if torch.is_grad_enabled() and any(each.requires_grad for each in (weight, *codes)):
        return Products.apply(weight, *codes)
    return (torch.cat(list(codes)) @ weight).split([len(code) for code in codes])
