"""Which state dicts fit a retrofitted root: checked before anything is copied, with layers that may be reset."""

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from csg_seg.errors import CSGError, abridge
from csg_seg.generators.linear import Generator
from csg_seg.generators.settings import matches
from csg_seg.generators.signature import check_signature, read_layers

from .conv import DENSE_KINDS, FROM_ROOT, CSGConv, check_finite, named_convs
from .root import BANK

Shape = tuple[int, ...]
FIXED = (*DENSE_KINDS, nn.Linear, _NormBase, nn.GroupNorm, nn.LayerNorm)


@dataclass
class Reset:
    """Which layers keep their start values if a checkpoint does not fit them, such as a head for other classes.

    A layer that fits is loaded. Copies of a network, such as an EMA's, share this object: they load the same
    checkpoint.

    Attributes:
        patterns: of layer names, as for ``include``.
        is_on: whether the patterns apply now, which is when training begins or a call says so.
        layers: the layers that the last load reset.
        on_reset: called with ``layers`` if there are any.
    """

    patterns: tuple[str, ...] = ()
    is_on: bool = False
    layers: tuple[str, ...] = ()
    on_reset: Callable[[Sequence[str]], None] | None = None

    def __deepcopy__(self, memo: Any) -> 'Reset':
        return self

    @contextmanager
    def allow(self, patterns: Sequence[str]) -> Iterator[None]:
        """Apply these patterns within a ``with`` block."""
        before = self.patterns, self.is_on
        self.patterns, self.is_on = tuple(patterns), True
        try:
            yield
        finally:
            self.patterns, self.is_on = before


class Bank(Protocol):
    """What loading needs of a :class:`csg_seg.layers.bank.GeneratorBank`."""

    layers: dict[str, CSGConv]

    def __len__(self) -> int: ...
    def __iter__(self) -> Iterator[Generator]: ...
    def __getitem__(self, position: int) -> Any: ...
    def state_dict(self) -> dict[str, Tensor]:
        """Return the generators' entries."""

    def load_state_dict(self, state_dict: Mapping[str, Tensor]) -> Any:
        """Load the generators' entries."""


def check_signatures(bank: Bank, state_dict: Mapping[str, Tensor], prefix: str = '') -> None:
    """Refuse generators that were made with other settings.

    Args:
        bank: the network's generators.
        state_dict: holds the bank's entries, whose names begin with the prefix.
        prefix: before the names.

    Raises:
        CSGError: a setting differs.
    """
    for position, generator in enumerate(bank):
        state = state_dict.get(f'{prefix}{position}._extra_state')
        if state is not None:
            check_signature(generator.settings, state)


def check_reset(root: nn.Module, patterns: Sequence[str]) -> None:
    """Refuse a pattern that matches no layer.

    Raises:
        CSGError: names the pattern.
    """
    names = [name for name, _ in root.named_modules(remove_duplicate=False) if name and _part(name) != BANK]
    for pattern in patterns:
        if not any(matches(name, pattern) for name in names):
            like = f'; names look like {names[-1]!r}' if names else ''
            raise CSGError(f'reset pattern {pattern!r} names no layer of the model{like}')


@dataclass
class Incoming:
    """A state dict that is about to be loaded into a retrofitted root.

    Attributes:
        root: its bank is up to date.
        bank: the root's generators.
        reset: which layers keep their start values if they do not fit.
        state_dict: changed in place by :meth:`prepare`.
        prefix: of the root's names in the state dict.
    """

    root: nn.Module
    bank: Bank
    reset: Reset
    state_dict: dict[str, Tensor]
    prefix: str

    def prepare(self) -> None:
        """Refuse a state dict that does not fit the generated layers, and complete one that does.

        Trainers load without ``strict``, which would keep random codes without a word. A dense state dict is
        completed by the current generators, which are fitted to it afterwards. Layers that are reset keep their
        current values.

        Raises:
            CSGError: codes or generators are missing or were made with other settings, a layer is generated in one
                of the two and dense in the other, a weight has another shape, or a dense state dict belongs to
                another network.
        """
        self.convs = named_convs(self.root)
        own = {f'{self.prefix}{BANK}.{name}': tensor for name, tensor in self.bank.state_dict().items()}
        self.is_dense = (
            any(f'{self.prefix}{name}.weight' in self.state_dict for name in self.convs)
            and not any(f'{self.prefix}{name}.code' in self.state_dict for name in self.convs)
            and not own.keys() & self.state_dict.keys()
        )
        if not self.is_dense:
            check_signatures(self.bank, self.state_dict, f'{self.prefix}{BANK}.')
        self.generators = {} if self.is_dense else self._read_generators()
        # The generator's position and the weight's shape, by name of the layer; older files lack them.
        self.stored = {
            name: (position, shape)
            for position, layers in self.generators.items()
            for name, shape in (layers or {}).items()
        }
        self.reset.layers = tuple(self._reset_layers()) if self.reset.is_on else ()
        if self.reset.layers and self.reset.on_reset is not None:
            self.reset.on_reset(self.reset.layers)
        self.loaded = {name: conv for name, conv in self.convs.items() if name not in self.reset.layers}
        self._check_dense_layers()
        if self.is_dense:
            self._check_dense_network()
            self.state_dict.update(own)
        else:
            self._check_entries(own)
            self._check_count()
            self._check_layers()
            self._check_renamed()
            self._check_shapes()
        self.state_dict.update({f'{self.prefix}{name}.{FROM_ROOT}': torch.empty(0) for name in self.convs})

    def _read_generators(self) -> dict[int, dict[str, Shape] | None]:
        """Return the layers of each generator in the state dict, by its position; None if they are not stored."""
        pattern = re.compile(rf'{re.escape(self.prefix)}{BANK}\.(\d+)\._extra_state')
        found = ((pattern.fullmatch(name), state) for name, state in self.state_dict.items())
        return {int(match[1]): read_layers(state) for match, state in found if match}

    def _check_count(self) -> None:
        """Refuse more generators than the model has if their layers are not stored."""
        if any(position >= len(self.bank) and layers is None for position, layers in self.generators.items()):
            raise CSGError(
                f'the checkpoint holds {len(self.generators)} generators, this model has {len(self.bank)}; '
                "set the config's csg to the checkpoint's"
            )

    def _check_entries(self, own: Mapping[str, Tensor]) -> None:
        """Refuse a state dict that lacks entries of generators or generated layers, or has them in other shapes."""
        wanted = dict(own)
        for name, conv in self.convs.items():
            wanted |= {f'{self.prefix}{name}.{key}': tensor for key, tensor in conv.stored().items()}
        missing = [name for name in wanted if name not in self.state_dict]
        if missing:
            raise CSGError(
                f'the checkpoint lacks {missing[0]} ({len(missing)} such entries of generated layers); '
                'it was made from another network or with other settings: take a checkpoint of this config, '
                'or name the layers in reset'
            )
        for name, tensor in wanted.items():
            shape = self.state_dict[name].shape
            if shape != tensor.shape and not name.endswith('_extra_state'):
                raise CSGError(
                    f'{name}: the checkpoint holds {tuple(shape)}, this model wants {tuple(tensor.shape)}; '
                    "set the config's csg to the checkpoint's, take another checkpoint, or name the layer in reset"
                )

    def _check_layers(self) -> None:
        """Refuse layers whose weight has another shape in the checkpoint, or another generator."""
        for name, conv in self.loaded.items():
            # A name that is not stored was changed after the state dict was written, or is an alias.
            position, shape = self.stored.get(name, (None, None))
            if shape is not None and shape != conv.weight_shape:
                raise CSGError(
                    f'{name}: the checkpoint holds a weight of {shape}, this model wants {tuple(conv.weight_shape)}; '
                    'take a checkpoint of the same network, or name the layer in reset'
                )
            if position is not None and not self._is_generator(position, conv):
                raise CSGError(
                    f'{name} is generated by generator {position} in the checkpoint and by another one in this '
                    "model; set the config's csg to the checkpoint's, in the same order"
                )

    def _is_generator(self, position: int, conv: CSGConv) -> bool:
        return position < len(self.bank) and self.bank[position] is conv.generator

    def _check_renamed(self) -> None:
        """Refuse layers that are stored under other names, if no unmatched name has such a weight."""
        known = {conv for name, conv in self.loaded.items() if name in self.stored}  # under one of its names
        unknown = {conv: name for name, conv in self.loaded.items() if conv not in known}
        unmatched = Counter(shape for name, (_, shape) in self.stored.items() if name not in self.loaded)
        for conv, name in unknown.items() if self.stored else ():
            shape = tuple(conv.weight_shape)
            unmatched[shape] -= 1
            if unmatched[shape] < 0:
                raise CSGError(
                    f'{name}: the checkpoint has no layer of this name, and no other unmatched layer with a weight of '
                    f'{shape}; take a checkpoint of the same network, or name the layer in reset'
                )

    def _check_shapes(self) -> None:
        """Refuse torch's own layers of another shape, which mmengine only logs.

        Other modules may adapt what they load, such as position embeddings of another image size.
        """
        for name, module in self.root.named_modules(remove_duplicate=False):
            if isinstance(module, CSGConv) or not isinstance(module, FIXED):
                continue
            for key, own in [*module._parameters.items(), *module._buffers.items()]:
                entry = f'{name}.{key}' if name else key
                stored = self.state_dict.get(f'{self.prefix}{entry}')
                if own is not None and own.ndim and stored is not None and stored.shape != own.shape:
                    raise CSGError(
                        f'{entry}: the checkpoint holds {tuple(stored.shape)}, this model wants {tuple(own.shape)}; '
                        'take a checkpoint of the same network, or name the layer in reset'
                    )

    def _check_dense_layers(self) -> None:
        """Refuse codes of layers that are dense in the model, whose weights would not be loaded."""
        modules = dict(self.root.named_modules(remove_duplicate=False))
        for key in self.state_dict:
            name = key.removeprefix(self.prefix).removesuffix('.code')
            module = modules.get(name) if key == f'{self.prefix}{name}.code' else None
            if module is None or isinstance(module, CSGConv) or f'{self.prefix}{name}.weight' in self.state_dict:
                continue
            if 'weight' in module._parameters and 'code' not in {*module._parameters, *module._buffers}:
                raise CSGError(
                    f'{name} is generated in the checkpoint and dense in this model; '
                    "set the config's csg (include, exclude, the number of dicts) to the checkpoint's"
                )

    def _check_dense_network(self) -> None:
        """Refuse weights of another network; a part that only one of the two has, such as a head, may differ."""
        stored = {name.removeprefix(self.prefix): tensor for name, tensor in self.state_dict.items()}
        known, parts = self.root.state_dict().keys(), set(map(_part, stored))
        wrong = [
            f'{name}.weight is missing'
            for name in self.loaded
            if f'{name}.weight' not in stored and _part(name) in parts
        ]
        for name, tensor in stored.items():
            conv = self.loaded.get(name.removesuffix('.weight')) if name.endswith('.weight') else None
            if conv is None:
                if tensor.ndim == 4 and name not in known and _part(name) in map(_part, self.loaded):
                    wrong.append(f'{name} {tuple(tensor.shape)} is not in the model')
            elif tensor.shape != conv.weight_shape:
                wrong.append(f'{name} is {tuple(tensor.shape)}, not {tuple(conv.weight_shape)}')
            check_finite(name, tensor)
        if wrong:
            raise CSGError(f"the dense checkpoint is another network's: {abridge(wrong)}")

    def _reset_layers(self) -> list[str]:
        """Replace entries that do not fit by the model's own where ``reset`` allows it, and return these layers."""
        patterns = self.reset.patterns
        check_reset(self.root, patterns)
        named = [(name, each) for name, each in self.root.named_modules(remove_duplicate=False) if _part(name) != BANK]
        allowed = {each for name, each in named if name and any(matches(name, pattern) for pattern in patterns)}
        own, stored = _by_layer(self.root.state_dict(), ''), _by_layer(self.state_dict, self.prefix)
        misfits = {
            each
            for name, each in named
            if each in allowed and not self._fits(name, each, own.get(name, {}), stored.get(name, {}))
        }
        reset = [name for name, each in named if each in misfits]
        gone = [name for name in stored if name not in own and any(matches(name, pattern) for pattern in patterns)]
        for name in [*reset, *gone]:
            for key in stored.get(name, ()):
                del self.state_dict[f'{self.prefix}{name}.{key}']
            self.state_dict.update({f'{self.prefix}{name}.{key}': each for key, each in own.get(name, {}).items()})
        return reset

    def _fits(self, name: str, module: nn.Module, own: Mapping[str, Tensor], stored: Mapping[str, Tensor]) -> bool:
        """Return whether a module's own entries can be loaded."""
        # Extra states need not be tensors.
        wanted = {key: getattr(each, 'shape', None) for key, each in own.items()}
        given = {key: getattr(each, 'shape', None) for key, each in stored.items()}
        if isinstance(module, CSGConv):
            if self.is_dense:
                wanted = {key: shape for key, shape in wanted.items() if key not in module.stored()}
                wanted['weight'] = module.weight_shape
            elif name in self.stored:
                position, shape = self.stored[name]
                if shape != module.weight_shape or not self._is_generator(position, module):
                    return False
        wanted.pop('num_batches_tracked', None)  # which files of old PyTorch versions lack
        given.pop('num_batches_tracked', None)
        return wanted == given


def _part(name: str) -> str:
    return name.split('.')[0]


def _by_layer(state_dict: Mapping[str, Tensor], prefix: str) -> dict[str, dict[str, Tensor]]:
    """Return the entries of each module, by its name."""
    layers: dict[str, dict[str, Tensor]] = {}
    for name, tensor in state_dict.items():
        if name.startswith(prefix):
            layer, _, key = name.removeprefix(prefix).rpartition('.')
            layers.setdefault(layer, {})[key] = tensor
    return layers
