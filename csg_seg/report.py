"""Counts of a model: what it stores, what it trains, and what the dense network would take."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, cast

from torch import Tensor, nn

from csg_seg.generators.linear import Generator
from csg_seg.generators.slices import grid
from csg_seg.layers.bank import check_module, find_roots
from csg_seg.layers.conv import CSGConv, find_convs, find_others

from .errors import CSGError, abridge


@dataclass(frozen=True)
class Layer:
    """One conv: the shape of its weight, and what it stores.

    ``generator`` (a position) and ``grid`` are None for a dense conv; ``left_dense`` says why it stayed dense.
    """

    name: str
    weight_shape: tuple[int, ...]
    grid: tuple[int, int] | None
    generator: int | None
    dense_params: int
    stored_params: int
    left_dense: str | None


@dataclass(frozen=True)
class GeneratorCount:
    """One generator, and how many layers and slices it generates.

    ``options`` are the settings that only some kinds of generator have.
    """

    generator: str
    slice_shape: tuple[int, ...]
    code_dim: int
    layout: str
    options: dict[str, int]
    stored_params: int
    trainable_params: int
    layers: int
    slices: int


@dataclass(frozen=True)
class Summary:
    """Counts of a whole model; print it for a table.

    Parameters are those of ``model.parameters()``, and bytes those of the state dict, buffers included. A binary
    generator stores no parameters, only a seed.
    """

    dense_params: int
    stored_params: int
    trainable_params: int
    dense_bytes: int
    stored_bytes: int
    generators: tuple[GeneratorCount, ...]
    layers: tuple[Layer, ...]

    @property
    def compression_ratio(self) -> float:
        """Dense parameters divided by stored parameters, above 1 if the model is smaller than dense."""
        return self.dense_params / self.stored_params if self.stored_params else 1.0

    def to_dict(self) -> dict[str, Any]:
        """Return everything as JSON-ready values."""
        return {**asdict(self), 'compression_ratio': self.compression_ratio}

    def headline(self) -> str:
        """Return the totals in one line."""
        ratio = self.compression_ratio
        compared = f'{ratio:.2f}x smaller' if ratio >= 1 else f'{1 / ratio:.2f}x LARGER'
        return (
            f'{self.stored_params:,} parameters stored ({self.trainable_params:,} trainable) '
            f'for {self.dense_params:,} dense: {compared}, '
            f'{self.stored_bytes / 1e6:.1f} MB for {self.dense_bytes / 1e6:.1f} MB'
        )

    def describe_growth(self) -> str:
        """Warn that the model stores more than the dense network, and say what would help; '' if it stores less."""
        if self.stored_params <= self.dense_params:
            return ''
        saved: Counter[int | None] = Counter()
        for layer in self.layers:
            saved[layer.generator] += layer.dense_params - layer.stored_params
        costly = [
            f'csg[{i}] stores {each.stored_params:,} for its generator and saves {saved[i]:,} in its layers'
            for i, each in enumerate(self.generators)
            if each.stored_params > saved[i]
        ]
        return (
            f'the network stores {self.stored_params:,} parameters, more than the {self.dense_params:,} of the dense '
            f'network: {"; ".join(costly)}. Smaller slices, a lower code_dim, more layers per generator, or '
            "generator='binary' would help"
        )

    def __str__(self) -> str:
        rows = [
            (
                each.name,
                _by(each.weight_shape),
                _by(each.grid or ()),
                str(each.generator),
                f'{each.dense_params:,}',
                f'{each.stored_params:,}',
            )
            for each in self.layers
            if each.generator is not None
        ]
        header = ('generated layer', 'weight', 'grid', 'generator', 'dense', 'stored')
        lines = _align([header, *rows]) if rows else ['no generated layers']
        lines += ['', *(self._generator_line(position) for position in range(len(self.generators)))]
        lines += self._left_dense_lines()
        lines += [each for each in (self.describe_growth(), self.headline()) if each]
        return '\n'.join(lines)

    def _generator_line(self, position: int) -> str:
        each = self.generators[position]
        options = ''.join(f', {key} {value}' for key, value in each.options.items())
        return (
            f'generator {position}: {each.generator}{options}, {each.layout}, slices of {_by(each.slice_shape)} '
            f'from codes of {each.code_dim}; {each.stored_params:,} parameters generate {each.slices:,} '
            f'slices of {each.layers} layers'
        )

    def _left_dense_lines(self) -> list[str]:
        by_reason = defaultdict(list)
        for layer in self.layers:
            if layer.left_dense:
                by_reason[layer.left_dense].append(layer.name)
        return [f'left dense, {reason}: {abridge(names)}' for reason, names in by_reason.items()]


def summarise(model: nn.Module) -> Summary:
    """Count the parameters and bytes of a model, retrofitted or dense, without changing it.

    Raises:
        CSGError: the model is a part of a retrofitted one.
    """
    check_module(model, 'summarise: the network')
    roots = list(find_roots(model))
    # Two roots may share a generator.
    generators = list(dict.fromkeys(generator for _, _, bank in roots for generator in bank))
    generated = [module for module in model.modules() if isinstance(module, CSGConv)]
    if not {conv.generator for conv in generated} <= {*generators}:
        raise CSGError('the generators of these layers belong to a larger model; give that model as a whole')
    left_dense = {prefix + name: str(reason) for prefix, _, bank in roots for name, reason in bank.left_dense.items()}
    convs: dict[str, nn.Module] = {**find_convs(model), **find_others(model)}
    layers = tuple(_layer(name, module, generators, left_dense.get(name)) for name, module in convs.items())
    stored, stored_bytes = _numel(model.parameters()), _bytes(model)
    saved = sum(layer.dense_params - layer.stored_params for layer in layers)
    saved -= sum(_numel(generator.parameters()) for generator in generators)
    saved_bytes = sum(
        (conv.weight_shape.numel() - _numel(conv.stored().values())) * conv.code.element_size() for conv in generated
    )
    return Summary(
        dense_params=stored + saved,
        stored_params=stored,
        trainable_params=_numel(parameter for parameter in model.parameters() if parameter.requires_grad),
        dense_bytes=stored_bytes + saved_bytes - sum(map(_bytes, generators)),
        stored_bytes=stored_bytes,
        generators=tuple(_generator(generator, generated) for generator in generators),
        layers=layers,
    )


def _layer(name: str, conv: nn.Module, generators: Sequence[Generator], left_dense: str | None) -> Layer:
    if not isinstance(conv, CSGConv):
        weight = cast(Tensor, conv.weight)
        return Layer(name, tuple(weight.shape), None, None, weight.numel(), weight.numel(), left_dense)
    return Layer(
        name=name,
        weight_shape=tuple(conv.weight_shape),
        grid=grid(conv.weight_shape, conv.generator.settings.slice_shape),
        generator=generators.index(conv.generator),
        dense_params=conv.weight_shape.numel(),
        stored_params=_numel(conv.stored().values()),
        left_dense=None,
    )


def _generator(generator: Generator, generated: Sequence[CSGConv]) -> GeneratorCount:
    convs = [conv for conv in generated if conv.generator is generator]
    settings = generator.settings
    return GeneratorCount(
        generator=settings.generator,
        slice_shape=settings.slice_shape,
        code_dim=settings.code_dim,
        layout=settings.layout,
        options=settings.optional,
        stored_params=_numel(generator.parameters()),
        trainable_params=_numel(parameter for parameter in generator.parameters() if parameter.requires_grad),
        layers=len(convs),
        slices=sum(len(conv.code) for conv in convs),
    )


def _numel(parameters: Iterable[Tensor]) -> int:
    return sum(parameter.numel() for parameter in parameters)


def _bytes(module: nn.Module) -> int:
    """Return the bytes of a state dict, without extra states that are not tensors."""
    tensors = [each for each in module.state_dict().values() if isinstance(each, Tensor)]
    return sum(each.numel() * each.element_size() for each in tensors)


def _by(shape: Sequence[int]) -> str:
    return 'x'.join(map(str, shape))


def _align(rows: Sequence[Sequence[str]]) -> list[str]:
    first, *others = (max(map(len, column)) for column in zip(*rows, strict=True))
    return [
        '  '.join([row[0].ljust(first), *(cell.rjust(width) for cell, width in zip(row[1:], others, strict=True))])
        for row in rows
    ]
