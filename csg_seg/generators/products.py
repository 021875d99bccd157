"""Many codes times one weight, in one matmul."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn


class Products(torch.autograd.Function):
    """``code @ weight`` for many codes in one matmul.

    A code whose slices are not used gets no gradient, as with separate matmuls. The
    inputs are parameters and are stored on ``ctx`` directly, without saved-tensor hooks.
    Activation checkpointing counts calls of those hooks, and the count must not depend
    on whether a layer's slices were generated inside its checkpointed part or before it.
    """

    @staticmethod
    def forward(ctx: Any, weight: Tensor, *codes: Tensor) -> tuple[Tensor, ...]:
        """Multiply codes, each ``(n, code_dim)``, with a weight ``(code_dim, size)``."""
        ctx.set_materialize_grads(False)
        ctx.weight, ctx.codes = weight, codes
        ctx.versions = weight._version, [code._version for code in codes]
        return (torch.cat(codes) @ weight).split([len(code) for code in codes])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        """Return the gradients of the weight and of each code.

        Raises:
            RuntimeError: an input was modified in place since the forward pass.
        """
        used = {position: each for position, each in enumerate(gradients) if each is not None}
        weight_version, code_versions = ctx.versions
        codes_changed = any(ctx.codes[position]._version != code_versions[position] for position in used)
        weight_changed = ctx.weight._version != weight_version
        if (ctx.needs_input_grad[0] and codes_changed) or (any(ctx.needs_input_grad[1:]) and weight_changed):
            raise RuntimeError(
                'a code or a generator was modified by an inplace operation between forward and backward pass'
            )
        weight_gradient: Tensor | None = None
        code_gradients: dict[int, Tensor] = {}
        if used:
            codes = [ctx.codes[position] for position in used]
            with torch.autocast(ctx.weight.device.type, enabled=False):
                gradient = torch.cat(list(used.values()))
                # Slices that autocast made in half precision send their gradients back in half precision.
                code, weight = torch.cat(codes).to(gradient), ctx.weight.to(gradient)
                if ctx.needs_input_grad[0]:
                    weight_gradient = (code.T @ gradient).to(ctx.weight)
                if any(ctx.needs_input_grad[1:]):
                    parts = (gradient @ weight.T).to(ctx.weight).split([len(code) for code in codes])
                    code_gradients = dict(zip(used, parts, strict=True))
        return weight_gradient, *(code_gradients.get(position) for position in range(len(gradients)))


def is_recorded() -> bool:
    """Say whether this code is being compiled, traced or transformed; these need plain matmuls."""
    return (
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        # The check in torch.autograd.Function.apply.
        or torch._C._are_functorch_transforms_active()  # type: ignore[attr-defined]
    )


def multiply(weight: Tensor, codes: Sequence[Tensor]) -> Sequence[Tensor]:
    """Return ``code @ weight`` for each code."""
    if is_recorded() or not all(type(code) is nn.Parameter for code in codes):
        return [code @ weight for code in codes]
    if torch.is_grad_enabled() and any(each.requires_grad for each in (weight, *codes)):
        return Products.apply(weight, *codes)
    return (torch.cat(list(codes)) @ weight).split([len(code) for code in codes])
