"""Gradient accumulation: weights made once for several batches."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

from csg_seg.errors import CSGError
from csg_seg.generators.linear import Generator, has_hooks

from .ahead import drop, generate_in_batches
from .conv import CSGConv, autocast_dtype


class Accumulation:
    """Weights made once, whose gradients add up over several batches before they are sent through the generators.

    Attributes:
        is_on: whether a :meth:`block` has begun and not ended.
        made: the weights by layer, with the graph of their generation; empty until the first forward pass.
        leaves: copies without a graph, which the layers compute with and which collect the gradients.
        inputs: the parameters that each was made of.
        dtypes: of autocast when the weights were made; None for layers that it does not affect.
    """

    def __init__(self) -> None:
        self._clear()

    def _clear(self) -> None:
        self.is_on = False
        self.made: dict[CSGConv, Tensor] = {}
        self.leaves: dict[CSGConv, Tensor] = {}
        self.inputs: dict[CSGConv, list[nn.Parameter]] = {}
        self.dtypes: set[torch.dtype | None] = set()

    def __reduce__(self) -> tuple[Any, ...]:
        """Copy and pickle without what is going on."""
        return Accumulation, ()

    @contextmanager
    def block(self, generators: Iterable[Generator], layers: Mapping[str, CSGConv]) -> Iterator[None]:
        """See :meth:`csg_seg.layers.bank.GeneratorBank.accumulate`."""
        stored = [each for generator in generators for each in generator.parameters()]
        stored += [each for conv in layers.values() for each in conv.stored().values()]
        if self.is_on:
            raise CSGError('gradients are being accumulated already; leave the other block first')
        if any(type(each) is not nn.Parameter for each in stored):
            raise CSGError('codes or generators are sharded; accumulate their gradients without this block')
        own = {id(each) for each in stored}

        def check_step(optimizer: Optimizer, *_: object) -> None:
            if any(id(each) in own for group in optimizer.param_groups for each in group['params']):
                raise CSGError('gradients are still being accumulated; step the optimizer after the with block')

        self.is_on = True
        handle = register_optimizer_step_pre_hook(check_step)
        try:
            yield
            self._send()
        finally:
            handle.remove()
            drop(layers)
            self._clear()

    def provide(self, generators: Iterable[Generator], layers: Mapping[str, CSGConv]) -> None:
        """Give the layers their weights, for the forward pass that begins and for recomputing it.

        They are made in the first pass, because autocast may be on in passes alone.

        Raises:
            CSGError: autocast is not as it was in the first pass.
        """
        dtypes = {autocast_dtype(conv.generator, conv.code.device.type) for conv in layers.values()}
        if not self.made:
            self._make(generators, layers)
            self.dtypes = dtypes
        elif dtypes != self.dtypes:
            raise CSGError(
                'autocast differs between the batches in csg.accumulate(); use it for all of them, or leave the block '
                'in between'
            )
        for conv, leaf in self.leaves.items():
            conv.__dict__['ready'] = partial(_if_learning, leaf, conv, self.inputs[conv])

    def _make(self, generators: Iterable[Generator], layers: Mapping[str, CSGConv]) -> None:
        for generator in generators:
            convs = [conv for conv in layers.values() if conv.generator is generator]
            learns = any(each.requires_grad for each in generator.parameters())
            learning = [conv for conv in convs if learns or any(each.requires_grad for each in conv.stored().values())]
            # One by one, where layers that a batch does not use would get gradients of zero.
            at_once = generator.is_product and not has_hooks(generator)
            weights = generate_in_batches(learning) if at_once else map(CSGConv.generate_weight, learning)
            self.made.update(zip(learning, weights, strict=True))
        # In the parameters' precision, for the sums. Autocast casts them for each batch, as it casts dense weights.
        self.leaves = {conv: made.detach().to(conv.code.dtype).requires_grad_() for conv, made in self.made.items()}
        self.inputs = {conv: _parameters_of(conv) for conv in self.made}
        for leaf in self.leaves.values():
            leaf.register_hook(partial(self._check_open, self.leaves))

    def _check_open(self, leaves: dict[CSGConv, Tensor], gradient: Tensor) -> None:
        """Refuse a gradient that comes after the block of its leaves, when nothing would send it on."""
        if self.leaves is not leaves:
            raise CSGError('the backward pass of a batch in csg.accumulate() must run inside the with block')

    def _send(self) -> None:
        """Send the sums of the weights' gradients through the generators."""
        used = [(made, grad) for conv, made in self.made.items() if (grad := self.leaves[conv].grad) is not None]
        if self.made and not used:
            raise CSGError(
                'no generated weight got a gradient in csg.accumulate(); call backward() inside the with block, '
                'without inputs'
            )
        torch.autograd.backward([made for made, _ in used], [grad.to(made.dtype) for made, grad in used])


def _parameters_of(conv: CSGConv) -> list[nn.Parameter]:
    return [*conv.stored().values(), *conv.generator.parameters()]


def _if_learning(leaf: Tensor, conv: CSGConv, inputs: list[nn.Parameter]) -> Tensor | None:
    """Return the leaf where gradients are recorded, unless the conv has other parameters for the moment."""
    is_own = all(each is other for each, other in zip(_parameters_of(conv), inputs, strict=True))
    return leaf if is_own and torch.is_grad_enabled() else None
