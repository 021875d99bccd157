"""Weights made ahead: small ones together at the start of a forward pass, all of them once for several evaluations.

docs/speed.md has the times with and without it.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from numbers import Number
from threading import get_ident
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from csg_seg.generators.linear import Generator, has_hooks
from csg_seg.generators.slices import in_memory_order

from .conv import CSGConv, autocast_dtype, generate_weights

# Batch layers up to this many weight values per product; beyond it, memory traffic costs more than it saves.
AT_ONCE = 2**20


class Cached(NamedTuple):
    """Weights cached between evaluations: copies of their inputs, the weights, and their version counters.

    ``dtype`` is that of :func:`csg_seg.layers.conv.autocast_dtype` when they were made, and ``options`` are other
    values that the generator may depend on.
    """

    inputs: list[Tensor]
    weights: list[Tensor]
    versions: list[int]
    dtype: torch.dtype | None
    options: list[Any]


class Ready:
    """A weight made for one forward pass, with its thread, its inputs and their version counters.

    A conv calls it for the weight; it returns None if the conv must generate its weight itself.
    """

    def __init__(self, weight: Tensor, conv: CSGConv):
        self.weight, self.conv, self.inputs = weight, conv, _inputs(conv)
        self.thread, self.versions, self.dtype = get_ident(), _versions(self.inputs), self._autocast_dtype()
        # A hook before the conv's forward may write to .data, which does not change the version counter.
        self.copies = [each.detach().clone() for each in conv.stored().values()] if conv._forward_pre_hooks else []

    def __call__(self) -> Tensor | None:
        """Return the weight, unless another thread reads it, an input or the precision changed, or it lacks a graph.

        An input also counts as changed if ``functional_call`` replaces it.
        """
        has_graph = self.weight.requires_grad or not torch.is_grad_enabled()
        is_current = torch.compiler.is_compiling() or (
            self.thread == get_ident()
            and [*map(id, self.inputs)] == [*map(id, _inputs(self.conv))]
            and self.versions == _versions(self.inputs)
            and self.dtype == self._autocast_dtype()
            and all(map(torch.equal, self.copies, self.conv.stored().values()))
        )
        return self.weight if has_graph and is_current else None

    def _autocast_dtype(self) -> torch.dtype | None:
        return autocast_dtype(self.conv.generator, self.weight.device.type)


class Ahead:
    """Make the weights of a network's layers ahead of each forward pass of its root.

    Attributes:
        cached: the weights of the last evaluation, by the position of their generator.
    """

    def __init__(self) -> None:
        self.cached: dict[int, Cached] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        """Copy and pickle without the cached weights."""
        return Ahead, ()

    def make(self, generators: Iterable[Generator], layers: Mapping[str, CSGConv]) -> None:
        """Make the weights for the forward pass that begins.

        Without gradients, weights are cached from pass to pass, as long as all their inputs have the same values. A
        layer that is called outside the pass, compiled or recomputed generates its weight itself, and so does one
        whose code or generator was written to since the pass began.
        """
        for position, generator in enumerate(generators):
            if not _is_plain(generator):
                continue
            convs = [conv for conv in layers.values() if conv.generator is generator and _has_plain_code(conv)]
            if torch.is_grad_enabled() or (generator.training and not generator.is_product):  # it may have dropout
                self.cached.pop(position, None)
            if torch.is_grad_enabled():
                weights = _generate_small(convs) if generator.is_product else {}
            else:
                weights = self._read(position, convs) if convs else {}
            for conv, weight in weights.items():
                # nn.Module.__setattr__ is slow.
                conv.__dict__['ready'] = Ready(weight, conv)

    def _read(self, position: int, convs: Sequence[CSGConv]) -> dict[CSGConv, Tensor]:
        """Return the weights of one generator's convs, from the cache if nothing has changed."""
        generator = convs[0].generator
        inputs = [torch.cat([conv.code for conv in convs]), *generator.parameters(), *generator.buffers()]
        if generator.settings.residual:
            inputs += [each for conv in convs for each in (conv.residual_out, conv.residual_in)]
        # Compare values: a write to .data, as by an EMA, does not change the version counter.
        cached, dtype = self.cached.get(position), autocast_dtype(generator, inputs[0].device.type)
        options = _options(generator)
        if (
            cached is None
            or cached.dtype != dtype
            or cached.options != options
            or cached.versions != _versions(cached.weights)
            or not all(map(_same, cached.inputs, inputs))
        ):
            # A cropped weight is a view, which every conv would copy.
            pairs = zip(convs, generate_in_batches(convs), strict=True)
            weights = [in_memory_order(weight, channels_last=conv.channels_last) for conv, weight in pairs]
            copies = [each.clone() for each in inputs]
            cached = self.cached[position] = Cached(copies, weights, _versions(weights), dtype, options)
        return dict(zip(convs, cached.weights, strict=True))


def drop(layers: Mapping[str, CSGConv]) -> None:
    """Let each layer generate its weight itself again."""
    for conv in layers.values():
        conv.__dict__.pop('ready', None)


def generate_in_batches(convs: Sequence[CSGConv]) -> list[Tensor]:
    """Return the weights of convs of one generator, by one product for each of :func:`batches`."""
    return [weight for batch in batches(convs) for weight in generate_weights(batch)]


def batches(convs: Sequence[CSGConv]) -> Iterator[list[CSGConv]]:
    """Yield neighbouring convs whose weights have at most :data:`AT_ONCE` values together, or one larger conv."""
    batch: list[CSGConv] = []
    for conv in convs:
        if batch and sum(each.weight_shape.numel() for each in (*batch, conv)) > AT_ONCE:
            yield batch
            batch = []
        batch.append(conv)
    if batch:
        yield batch


def _generate_small(convs: Iterable[CSGConv]) -> dict[CSGConv, Tensor]:
    """Return the weights of small layers that learn. A large layer generates its own later, which saves memory."""
    learning = [conv for conv in convs if conv.code.requires_grad or conv.generator.weight.requires_grad]
    small = [batch for batch in batches(learning) if len(batch) > 1]
    return {conv: weight for batch in small for conv, weight in zip(batch, generate_weights(batch), strict=True)}


def _is_plain(generator: Generator) -> bool:
    """Return whether calling a generator computes with its own parameters, without hooks or parametrisations."""
    are_plain = all(type(each) is nn.Parameter for each in generator.parameters())
    return are_plain and not any(has_hooks(each) or is_parametrized(each) for each in generator.modules())


def _options(generator: Generator) -> list[Any]:
    """Return the simple attributes of a generator of a user's class, which it may compute with."""
    values = [] if generator.is_product else [vars(module) for module in generator.modules()]
    return [{key: each for key, each in own.items() if isinstance(each, (Number, str))} for own in values]


def _has_plain_code(conv: CSGConv) -> bool:
    """Return whether the code is an ordinary parameter of a conv that is fitted.

    Sharded, traced and swapped parameters have other types or shapes, and their values are not known yet; tensors
    made in inference mode have no version counter.
    """
    code = conv.code
    is_plain = type(code) is nn.Parameter and code.dim() == 2 and not (code.is_meta or code.is_inference())
    return is_plain and conv.loaded is None


def _inputs(conv: CSGConv) -> list[Tensor]:
    """Return what a conv's weight is made of."""
    inputs: list[Tensor] = [*conv.stored().values()]
    for module in conv.generator.modules():
        inputs += [each for each in (*module._parameters.values(), *module._buffers.values()) if each is not None]
    return inputs


def _versions(tensors: Iterable[Tensor]) -> list[int]:
    """Return torch's version counters, 0 for tensors made in inference mode."""
    return [0 if tensor.is_inference() else tensor._version for tensor in tensors]


def _same(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and one.device == other.device and torch.equal(one, other)
