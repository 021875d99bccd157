"""Which state dicts fit a retrofitted root: checked before anything is copied, with layers that may be reset."""

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from os.path import commonprefix
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from csg_seg.errors import CSGError, abridge, nearest
from csg_seg.generators.linear import Generator
from csg_seg.generators.settings import matches
from csg_seg.generators.signature import check_signature, read_layers
from csg_seg.generators.slices import grid

from .conv import DENSE_KINDS, FROM_ROOT, CSGConv, check_codes, check_finite, generated_convs
from .root import BANK, Generators

Shape = tuple[int, ...]
FIXED = (*DENSE_KINDS, nn.Linear, _NormBase, nn.GroupNorm, nn.LayerNorm)
OTHER_NETWORK = 'take a checkpoint of the same network; to train from this one, name the layer in reset'
OTHER_SETTINGS = (
    "set csg to the checkpoint's and freeze the same layers before retrofit, or take another checkpoint; "
    'to train from this one, name the layer in reset'
)
# Names under which DataParallel, DistributedDataParallel and torch.compile hold a network.
WRAPPERS = ('module', '_orig_mod')
OTHER_NAMES = 'no name is one of this model: take a checkpoint of the same network, or rename its tensors'


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


def generator_entries(bank: Generators, prefix: str = '') -> dict[str, Tensor]:
    """Return the generators' entries in the state dict of a root whose names begin with the prefix."""
    return {f'{prefix}{BANK}.{name}': tensor for name, tensor in bank.state_dict().items()}


def check_signatures(bank: Generators, state_dict: Mapping[str, Tensor], prefix: str = '') -> None:
    """Refuse generators that were made with other settings.

    Args:
        bank: the network's generators.
        state_dict: of a network, with the generators' settings.
        prefix: of the root's names in the state dict.

    Raises:
        CSGError: a setting differs.
    """
    for position, generator in enumerate(bank):
        state = state_dict.get(f'{prefix}{BANK}.{position}._extra_state')
        if state is not None:
            check_signature(generator.settings, state)


def check_entries(needed: Mapping[str, Tensor], state_dict: Mapping[str, Tensor], remedy: str) -> None:
    """Refuse a state dict that lacks entries of generators or generated layers, or has them in other shapes."""
    missing = [name for name in needed if name not in state_dict]
    if missing:
        if all(name.endswith('_extra_state') for name in missing):
            remedy = f'a compact file is read by csg_seg.load_compact(path, model); for other files, {remedy}'
        raise CSGError(f'the checkpoint lacks {abridge(missing)}; {remedy}')
    for name, tensor in needed.items():
        if not name.endswith('_extra_state'):
            _check_shape(name, state_dict[name].shape, tensor.shape, remedy)


def _check_shape(name: str, stored: Sequence[int], needed: Sequence[int], remedy: str, *, what: str = '') -> None:
    if tuple(stored) != tuple(needed):
        raise CSGError(
            f'{name}: the checkpoint holds {what}{tuple(stored)}, this model needs {tuple(needed)}; {remedy}'
        )


def describe_names(state_dict: Mapping[str, Any], prefix: str = '', known: Iterable[str] = ()) -> str:
    """Say what to do about a state dict none of whose names is the model's.

    Args:
        state_dict: to be loaded.
        prefix: of the model's names, if it is inside a wrapper.
        known: the model's names, with the prefix.
    """
    if prefix and any(name.removeprefix(prefix) in state_dict for name in known):
        return f'its names lack {prefix!r}: load it into the network inside the wrapper, model.{prefix[:-1]}'
    nested = [name for name, each in state_dict.items() if isinstance(each, Mapping) and 'param_groups' not in each]
    if nested:
        return f'load its entry {nested[0]!r}'
    first = next(iter(state_dict), '').partition('.')[0]
    # Layers that are reset have been added under their own names.
    if first in WRAPPERS and 2 * sum(name.startswith(f'{first}.') for name in state_dict) > len(state_dict):
        return f'its names begin with {first}: save the network inside the wrapper, or remove this part of the names'
    return OTHER_NAMES


def check_reset(root: nn.Module, patterns: Sequence[str]) -> None:
    """Refuse a pattern that matches no layer.

    Raises:
        CSGError: names the pattern.
    """
    names = [name for name, _ in root.named_modules(remove_duplicate=False) if name and _part(name) != BANK]
    for pattern in patterns:
        if not any(matches(name, pattern) for name in names):
            like = nearest(pattern, names) if names else 'it has none'
            raise CSGError(f'reset pattern {pattern!r} names no layer of the model; {like}')


@dataclass
class StateDictChecks:
    """The checks of a state dict that is about to be loaded into a retrofitted root.

    Attributes:
        root: its bank is up to date.
        bank: the root's generators.
        reset: which layers keep their start values if they do not fit.
        state_dict: changed in place by :meth:`run`.
        prefix: of the root's names in the state dict.
        convs: the generated layers by all their names.
        own: the bank's entries, by their names in the state dict.
        is_dense: whether the state dict is that of a dense network.
        generators: the layers of each generator in the state dict, by its position; None if they are not stored.
        stored: the generator's position and the weight's shape, by name of the layer; older files lack them.
        loaded: the generated layers that are not reset.
    """

    root: nn.Module
    bank: Generators
    reset: Reset
    state_dict: dict[str, Tensor]
    prefix: str
    convs: dict[str, CSGConv] = field(init=False)
    own: dict[str, Tensor] = field(init=False)
    is_dense: bool = field(init=False)
    generators: dict[int, dict[str, Shape] | None] = field(init=False)
    stored: dict[str, tuple[int, Shape]] = field(init=False)
    loaded: dict[str, CSGConv] = field(init=False)

    def __post_init__(self) -> None:
        self.convs = self.loaded = dict(generated_convs(self.root, remove_duplicate=False))
        self.own = generator_entries(self.bank, self.prefix)
        self.is_dense = (
            any(f'{self.prefix}{name}.weight' in self.state_dict for name in self.convs)
            and not any(f'{self.prefix}{name}.code' in self.state_dict for name in self.convs)
            and not self.own.keys() & self.state_dict.keys()
        )
        pattern = re.compile(rf'{re.escape(self.prefix)}{BANK}\.(\d+)\._extra_state')
        found = [] if self.is_dense else [(pattern.fullmatch(name), state) for name, state in self.state_dict.items()]
        self.generators = {int(match[1]): read_layers(state) for match, state in found if match}
        self.stored = {
            name: (position, shape)
            for position, layers in self.generators.items()
            for name, shape in (layers or {}).items()
        }

    def run(self) -> None:
        """Refuse a state dict that does not fit the generated layers, and complete one that does.

        Trainers load without ``strict``, which would keep random codes without a word. A dense state dict is
        completed by the current generators, which are fitted to it afterwards. Layers that are reset keep their
        current values.

        Raises:
            CSGError: codes or generators are missing, not finite or made with other settings, a layer is generated in
                one of the two and dense in the other, or has a code and a weight, a weight has another shape, or a
                dense state dict belongs to another network.
        """
        for name, conv in self.convs.items():
            check_codes(name, conv)
        if not self.is_dense:
            check_signatures(self.bank, self.state_dict, self.prefix)
        self.reset.layers = tuple(self._reset_layers()) if self.reset.is_on else ()
        if self.reset.layers and self.reset.on_reset is not None:
            self.reset.on_reset(self.reset.layers)
        self.loaded = {name: conv for name, conv in self.convs.items() if name not in self.reset.layers}
        self._check_dense_layers()
        if self.is_dense:
            self._check_dense_network()
            self._check_shapes()
            self.state_dict.update(self.own)
        else:
            needed = dict(self.own)
            for name, conv in self.convs.items():
                needed |= {f'{self.prefix}{name}.{key}': each for key, each in conv.stored().items()}
            check_entries(needed, self.state_dict, self._remedy(needed))
            self._check_count()
            self._check_layers()
            self._check_renamed()
            self._check_shapes()
            self._check_values()
        self.state_dict.update({f'{self.prefix}{name}.{FROM_ROOT}': torch.empty(0) for name in self.convs})

    def _remedy(self, needed: Mapping[str, Tensor]) -> str:
        """Say what to do about a state dict that lacks some of the needed entries."""
        if needed.keys() & self.state_dict.keys():
            return OTHER_SETTINGS
        others = (*self.root.named_parameters(), *self.root.named_buffers())
        if any(f'{self.prefix}{name}' in self.state_dict for name, _ in others):
            return 'it has other layers alone: load a whole state dict, of the CSG network or of the dense one'
        return describe_names(self.state_dict, self.prefix, needed)

    def _check_count(self) -> None:
        """Refuse more generators than the model has if their layers are not stored."""
        if any(position >= len(self.bank) and layers is None for position, layers in self.generators.items()):
            raise CSGError(
                f'the checkpoint holds {len(self.generators)} generators, this model has {len(self.bank)}; '
                "set csg to the checkpoint's"
            )

    def _check_layers(self) -> None:
        """Refuse layers whose weight has another shape in the checkpoint, or another generator."""
        for name, conv in self.loaded.items():
            # A name that is not stored was changed after the state dict was written, or is an alias.
            if name not in self.stored:
                continue
            position, shape = self.stored[name]
            _check_shape(name, shape, conv.weight_shape, OTHER_NETWORK, what='a weight of ')
            if not self._is_generator(position, conv):
                raise CSGError(
                    f'{name} is generated by generator {position} in the checkpoint and by another one in this '
                    "model; set csg to the checkpoint's, in the same order"
                )

    def _is_generator(self, position: int, conv: CSGConv) -> bool:
        return position < len(self.bank) and self.bank[position] is conv.generator

    def _check_renamed(self) -> None:
        """Refuse layers stored under other names if no unmatched name has such a weight, or if it is unclear which
        generator made it.
        """
        known = {conv for name, conv in self.loaded.items() if name in self.stored}  # under one of its names
        unknown = {conv: name for name, conv in self.loaded.items() if conv not in known}
        positions = {generator: position for position, generator in enumerate(self.bank)}
        others = {name: each for name, each in self.stored.items() if name not in self.convs}
        unmatched = Counter(others.values())
        for conv, name in unknown.items() if self.stored else ():
            shape = tuple(conv.weight_shape)
            needed = positions[conv.generator], shape
            unmatched[needed] -= 1
            if unmatched[needed] < 0:
                raise CSGError(
                    f'{name}: the checkpoint has no layer of this name, and no other unmatched layer of its generator '
                    f'with a weight of {shape}; {OTHER_NETWORK}'
                )
            alike = {
                other: each
                for other, each in others.items()
                if each[1] == shape and self._code_shape(*each) == tuple(conv.code.shape)
            }
            if {alike[other] for other in _same_end(name, alike)} != {needed}:
                raise CSGError(
                    f'{name}: the checkpoint has no layer of this name, and layers with a weight of {shape} from '
                    'several generators; rename the layers of the network that it was saved from, and save it again'
                )

    def _code_shape(self, position: int, shape: Shape) -> Shape | None:
        """Return the shape that one of the model's generators gives the code of a weight."""
        if position >= len(self.bank):
            return None
        settings = cast(Generator, self.bank[position]).settings
        return math.prod(grid(shape, settings.slice_shape)), settings.code_dim

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
                if own is not None and own.ndim and stored is not None:
                    _check_shape(entry, stored.shape, own.shape, OTHER_NETWORK)

    def _check_values(self) -> None:
        """Refuse codes and generators with NaN or infinity, and layers that have a code and a weight."""
        names = [f'{name}.{key}' for name, conv in self.loaded.items() for key in conv.stored()]
        for entry in [*self.own, *(f'{self.prefix}{name}' for name in names)]:
            tensor = self.state_dict[entry]
            if type(tensor) in (Tensor, nn.Parameter) and tensor.is_floating_point() and not tensor.is_meta:
                check_finite(entry.removeprefix(self.prefix), tensor)
        for name in self.loaded:
            if f'{self.prefix}{name}.weight' in self.state_dict:
                raise CSGError(f'{name}: the checkpoint holds a code and a weight of this layer; remove one of them')

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
        if any(conv.code.is_meta for conv in self.loaded.values()):
            raise CSGError(
                'a dense state dict cannot be fitted to a network on the meta device, which has no values; build the '
                'network elsewhere'
            )
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
            raise CSGError(
                f"the dense checkpoint is another network's: {abridge(wrong)}; to let layers start anew, "
                'name them in reset'
            )

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
        wanted.pop('num_batches_tracked', None)  # files of old PyTorch versions lack it
        given.pop('num_batches_tracked', None)
        return wanted == given


def _same_end(name: str, others: Iterable[str]) -> list[str]:
    """Return the names that share the most last parts with a name, such as 'net.conv' with 'model.net.conv'."""
    shared = {other: len(commonprefix([name.split('.')[::-1], other.split('.')[::-1]])) for other in others}
    return [other for other, count in shared.items() if count == max(shared.values())]


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
