"""What a state dict must satisfy to be loaded into a retrofitted root; checked before anything is copied."""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from csg_seg.errors import CSGError, abridge
from csg_seg.generators.settings import matches
from csg_seg.generators.signature import read_layers

from .conv import DENSE_KINDS, CSGConv, check_finite, named_convs
from .root import BANK

Shape = tuple[int, ...]
FIXED = (*DENSE_KINDS, nn.Linear, _NormBase, nn.GroupNorm, nn.LayerNorm)


@dataclass
class Reset:
    """Which layers may start anew where a checkpoint does not fit them, such as a head for other classes.

    A layer that fits is loaded all the same. Copies of a network, such as an EMA's, share it: they load the same
    checkpoint.

    Attributes:
        patterns: on layer names, as for ``include``.
        is_on: whether they may now: in a training that begins, or a call that says so.
        layers: those that did at the last load.
        tell: called with ``layers`` if there are any.
    """

    patterns: tuple[str, ...] = ()
    is_on: bool = False
    layers: tuple[str, ...] = ()
    tell: Callable[[Sequence[str]], None] | None = None

    def __deepcopy__(self, memo: Any) -> 'Reset':
        return self

    @contextmanager
    def allow(self, patterns: Sequence[str]) -> Iterator[None]:
        """Let layers of these patterns start anew, within a ``with`` block."""
        before = self.patterns, self.is_on
        self.patterns, self.is_on = tuple(patterns), True
        try:
            yield
        finally:
            self.patterns, self.is_on = before


class Bank(Protocol):
    """What loading needs of a :class:`csg_seg.bank.GeneratorBank`."""

    reset: Reset

    def __len__(self) -> int: ...
    def __getitem__(self, position: int) -> Any: ...
    def state_dict(self) -> dict[str, Tensor]:
        """Return the generators' entries."""

    def check_signatures(self, state_dict: Mapping[str, Tensor], prefix: str = '') -> None:
        """Refuse generators that were made with settings of another meaning."""


def check_reset(root: nn.Module, patterns: Sequence[str]) -> None:
    """Refuse a pattern that names no layer.

    Raises:
        CSGError: says which.
    """
    names = [name for name, _ in root.named_modules(remove_duplicate=False) if name and _part(name) != BANK]
    for pattern in patterns:
        if not any(matches(name, pattern) for name in names):
            like = f'; names look like {names[-1]!r}' if names else ''
            raise CSGError(f'reset pattern {pattern!r} names no layer of the model{like}')


def prepare(root: nn.Module, bank: Bank, state_dict: dict[str, Tensor], prefix: str) -> None:
    """Refuse a state dict that does not fit the generated layers of a root, and complete one that does.

    Trainers load without ``strict`` and would keep random codes in silence. A dense state dict is completed by the
    generators as they are, which are fitted to it afterwards; layers that are reset keep their current values.

    Args:
        root: retrofitted; its bank is up to date.
        bank: its generators; which layers may start anew, and did, is noted there.
        state_dict: changed in place.
        prefix: of the root's names in it.

    Raises:
        CSGError: codes or generators are missing or were made with other settings, a layer is generated in one of
            the two and dense in the other, its weight has another shape, or a dense state dict is another network's.
    """
    reset, convs = bank.reset, named_convs(root)
    stored_bank = {f'{prefix}{BANK}.{name}': tensor for name, tensor in bank.state_dict().items()}
    is_dense = _is_dense(state_dict, prefix, convs) and not stored_bank.keys() & state_dict.keys()
    if not is_dense:
        bank.check_signatures(state_dict, f'{prefix}{BANK}.')
    generators = {} if is_dense else _stored_generators(state_dict, prefix)
    stored = {
        name: (position, shape) for position, layers in generators.items() for name, shape in (layers or {}).items()
    }
    reset.layers = (
        tuple(_start_anew(root, bank, reset.patterns, None if is_dense else stored, state_dict, prefix))
        if reset.is_on
        else ()
    )
    if reset.layers and reset.tell is not None:
        reset.tell(reset.layers)
    _check_kinds(root, state_dict, prefix)
    if is_dense:
        _check_dense_network(root, reset.layers, state_dict, prefix)
        state_dict.update(stored_bank)
    else:
        _check_entries(stored_bank, convs, state_dict, prefix)
        _check_count(bank, generators)
        told = {name: conv for name, conv in convs.items() if name not in reset.layers}
        _check_layers(bank, told, stored)
        _check_renamed(told, stored)
        _check_shapes(root, state_dict, prefix)
    for conv, visits in Counter(convs.values()).items():
        conv.__dict__['_visits'] = visits


def _is_dense(state_dict: Mapping[str, Tensor], prefix: str, convs: Iterable[str]) -> bool:
    return any(f'{prefix}{name}.weight' in state_dict for name in convs) and not any(
        f'{prefix}{name}.code' in state_dict for name in convs
    )


def _stored_generators(state_dict: Mapping[str, Tensor], prefix: str) -> dict[int, dict[str, Shape] | None]:
    """Return the layers of each generator in a state dict, by its position; None where it does not tell of them."""
    pattern = re.compile(rf'{re.escape(prefix)}{BANK}\.(\d+)\._extra_state')
    found = ((pattern.fullmatch(name), state) for name, state in state_dict.items())
    return {int(match[1]): read_layers(state) for match, state in found if match}


def _check_count(bank: Bank, stored: Mapping[int, Mapping[str, Shape] | None]) -> None:
    """Refuse a state dict of more generators than the model's that does not tell which layers they feed."""
    if any(position >= len(bank) and layers is None for position, layers in stored.items()):
        raise CSGError(
            f"the checkpoint holds {len(stored)} generators, this model has {len(bank)}; set the config's csg to the "
            "checkpoint's"
        )


def _check_entries(
    stored_bank: Mapping[str, Tensor], convs: Mapping[str, CSGConv], state_dict: Mapping[str, Tensor], prefix: str
) -> None:
    """Refuse a state dict that lacks entries of generators or generated layers, or holds them in other shapes."""
    wanted = dict(stored_bank)
    for name, conv in convs.items():
        wanted |= {f'{prefix}{name}.{key}': tensor for key, tensor in conv.stored().items()}
    missing = [name for name in wanted if name not in state_dict]
    if missing:
        raise CSGError(
            f'the checkpoint lacks {missing[0]} ({len(missing)} such entries of generated layers); '
            'it was made from another network or with other settings: take a checkpoint of this config, '
            'or name the layers in reset'
        )
    for name, tensor in wanted.items():
        came = state_dict[name].shape
        if came != tensor.shape and not name.endswith('_extra_state'):
            raise CSGError(
                f'{name}: the checkpoint holds {tuple(came)}, this model wants {tuple(tensor.shape)}; '
                "set the config's csg to the checkpoint's, take another checkpoint, or name the layer in reset"
            )


def _check_layers(bank: Bank, convs: Mapping[str, CSGConv], stored: Mapping[str, tuple[int, Shape]]) -> None:
    """Refuse layers whose weight has another shape in the checkpoint, though as many codes, or another generator."""
    for name, conv in convs.items():
        # A name that the state dict does not tell of has been changed since it was written, or is an alias.
        position, shape = stored.get(name, (None, None))
        if shape is not None and shape != conv.weight_shape:
            raise CSGError(
                f'{name}: the checkpoint holds a weight of {shape}, this model wants {tuple(conv.weight_shape)}; '
                'take a checkpoint of the same network, or name the layer in reset'
            )
        if position is not None and (position >= len(bank) or bank[position] is not conv.generator):
            raise CSGError(
                f'{name}: generator {position} feeds it in the checkpoint and another one in this model; '
                "set the config's csg to the checkpoint's, in the same order"
            )


def _check_renamed(convs: Mapping[str, CSGConv], stored: Mapping[str, tuple[int, Shape]]) -> None:
    """Refuse layers that the state dict knows by other names, if none of these names has such a weight."""
    known = {id(conv) for name, conv in convs.items() if name in stored}  # under one of its names
    unknown = {id(conv): (name, tuple(conv.weight_shape)) for name, conv in convs.items() if id(conv) not in known}
    left = Counter(shape for name, (_, shape) in stored.items() if name not in convs)
    for name, shape in unknown.values() if stored else ():
        left[shape] -= 1
        if left[shape] < 0:
            raise CSGError(
                f'{name}: the checkpoint tells of no layer of this name, and of none more with a weight of {shape}; '
                'take a checkpoint of the same network, or name the layer in reset'
            )


def _check_shapes(root: nn.Module, state_dict: Mapping[str, Tensor], prefix: str) -> None:
    """Refuse torch's own layers of another shape, of which mmengine only writes a line into its log.

    Other modules may adapt what they load, such as position embeddings of another image size.
    """
    for name, module in root.named_modules(remove_duplicate=False):
        if isinstance(module, CSGConv) or not isinstance(module, FIXED):
            continue
        for key, own in [*module._parameters.items(), *module._buffers.items()]:
            entry = f'{name}.{key}' if name else key
            came = state_dict.get(f'{prefix}{entry}')
            if own is not None and own.ndim and came is not None and came.shape != own.shape:
                raise CSGError(
                    f'{entry}: the checkpoint holds {tuple(came.shape)}, this model wants {tuple(own.shape)}; take a '
                    'checkpoint of the same network, or name the layer in reset'
                )


def _check_kinds(root: nn.Module, state_dict: Mapping[str, Tensor], prefix: str) -> None:
    """Refuse codes of layers that are dense in the model: their weights would stay what they are."""
    modules = dict(root.named_modules(remove_duplicate=False))
    for key in state_dict:
        name = key.removeprefix(prefix).removesuffix('.code')
        module = modules.get(name) if key == f'{prefix}{name}.code' else None
        if module is None or isinstance(module, CSGConv) or f'{prefix}{name}.weight' in state_dict:
            continue
        if 'weight' in module._parameters and 'code' not in {*module._parameters, *module._buffers}:
            raise CSGError(
                f'{name} is generated in the checkpoint and dense in this model; '
                "set the config's csg (include, exclude, the number of dicts) to the checkpoint's"
            )


def _check_dense_network(root: nn.Module, anew: Sequence[str], state_dict: Mapping[str, Tensor], prefix: str) -> None:
    """Refuse another network's weights; a part that only one of the two has, such as a head, may differ."""
    convs = {name: conv for name, conv in named_convs(root).items() if name not in anew}
    stored = {name.removeprefix(prefix): tensor for name, tensor in state_dict.items()}
    known, parts = root.state_dict().keys(), set(map(_part, stored))
    wrong = [f'{name}.weight is missing' for name in convs if f'{name}.weight' not in stored and _part(name) in parts]
    for name, tensor in stored.items():
        conv = convs.get(name.removesuffix('.weight')) if name.endswith('.weight') else None
        if conv is None:
            if tensor.ndim == 4 and name not in known and _part(name) in map(_part, convs):
                wrong.append(f'{name} {tuple(tensor.shape)} is not in the model')
        elif tensor.shape != conv.weight_shape:
            wrong.append(f'{name} is {tuple(tensor.shape)}, not {tuple(conv.weight_shape)}')
        check_finite(name, tensor)
    if wrong:
        raise CSGError(f"the dense checkpoint is another network's: {abridge(wrong)}")


def _part(name: str) -> str:
    return name.split('.')[0]


def _start_anew(
    root: nn.Module,
    bank: Bank,
    patterns: Sequence[str],
    stored: Mapping[str, tuple[int, Shape]] | None,
    state_dict: dict[str, Tensor],
    prefix: str,
) -> list[str]:
    """Replace, in a state dict, the entries of layers that may start anew and do not fit by their own.

    Args:
        root: retrofitted.
        bank: its generators.
        patterns: of the layers that may.
        stored: generator and weight's shape of each layer, as far as they are known; None of a dense state dict.
        state_dict: changed in place.
        prefix: of the root's names in it.

    Returns:
        the names of these layers.
    """
    check_reset(root, patterns)
    named = [(name, each) for name, each in root.named_modules(remove_duplicate=False) if _part(name) != BANK]
    may = {id(each) for name, each in named if name and any(matches(name, pattern) for pattern in patterns)}
    own, theirs = _by_layer(root.state_dict(), ''), _by_layer(state_dict, prefix)
    misfits = {id(each) for name, each in named if id(each) in may and not _fits(name, each, bank, own, theirs, stored)}
    anew = [name for name, each in named if id(each) in misfits]
    gone = [name for name in theirs if name not in own and any(matches(name, pattern) for pattern in patterns)]
    for name in [*anew, *gone]:
        for key in theirs.get(name, ()):
            del state_dict[f'{prefix}{name}.{key}']
        state_dict.update({f'{prefix}{name}.{key}': each for key, each in own.get(name, {}).items()})
    return anew


def _by_layer(state_dict: Mapping[str, Tensor], prefix: str) -> dict[str, dict[str, Tensor]]:
    """Return the entries of each module, by its name."""
    layers: dict[str, dict[str, Tensor]] = {}
    for name, tensor in state_dict.items():
        if name.startswith(prefix):
            layer, _, key = name.removeprefix(prefix).rpartition('.')
            layers.setdefault(layer, {})[key] = tensor
    return layers


def _fits(
    name: str,
    module: nn.Module,
    bank: Bank,
    own: Mapping[str, Mapping[str, Tensor]],
    theirs: Mapping[str, Mapping[str, Tensor]],
    stored: Mapping[str, tuple[int, Shape]] | None,
) -> bool:
    """Say whether all that a module itself holds can be loaded."""
    wanted = {key: getattr(each, 'shape', None) for key, each in own.get(name, {}).items()}
    given = {key: getattr(each, 'shape', None) for key, each in theirs.get(name, {}).items()}
    if isinstance(module, CSGConv):
        if stored is None:
            wanted = {key: shape for key, shape in wanted.items() if key not in module.stored()}
            wanted['weight'] = module.weight_shape
        elif name in stored:
            position, shape = stored[name]
            if shape != module.weight_shape or position >= len(bank) or bank[position] is not module.generator:
                return False
    wanted.pop('num_batches_tracked', None)  # which files of old PyTorch versions lack
    given.pop('num_batches_tracked', None)
    return wanted == given
