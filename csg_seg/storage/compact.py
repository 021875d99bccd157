"""Compact checkpoints: generators once, codes, and the rest, in one safetensors file.

Tensors carry their state-dict names, matrices may be of lower precision; the
metadata holds ``generators`` (a JSON list of settings), ``layers`` (JSON, layer name
to generator position and weight shape), where the network comes from, and a SHA-256
of everything. A binary generator is its seed in the metadata alone. A file may come
from anywhere: all that it says is checked before memory is taken for it.
"""

import hashlib
import json
import math
import os
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from csg_seg.errors import CSGError, abridge
from csg_seg.files import write_whole
from csg_seg.generators.registry import build_generator
from csg_seg.generators.settings import Settings, matches, read_patterns
from csg_seg.generators.signature import SIGNATURE, encode_signature
from csg_seg.generators.slices import grid
from csg_seg.layers.bank import BANK, bank_of, find_bank, find_roots
from csg_seg.layers.conv import find_convs, generated_convs
from csg_seg.layers.loading import check_reset
from csg_seg.retrofitting.selection import Cause, Reason
from csg_seg.retrofitting.surgery import check_root, swap_layers
from csg_seg.retrofitting.weights import dense_shapes
from csg_seg.version import __version__

from .builders import build, check_source, decode_source, encode_source
from .precision import lower, matrices, restore

# Version 1 had binary generators of other values; version 2 neither source nor dtype, but is read.
FORMAT, VERSION, READABLE = 'csg_seg compact checkpoint', '3', ('2', '3')
# What a file claims to generate may be this much larger than what it stores, and what its
# network takes while it is built this much larger than its weights.
LARGEST_RATIO, SLACK = 1000, 8
_EXTRA = '_extra_state'
Shape = tuple[int, ...]
T = TypeVar('T')


@dataclass(frozen=True)
class Compact:
    """What a compact checkpoint holds.

    Attributes:
        tensors: the root's state dict, generator settings included.
        settings: one for each generator.
        layers: name of each generated layer, its generator's position and its weight's shape.
        source: for :func:`csg_seg.builders.build`, if the file says how to build the network.
        metadata: whatever else the writer noted, text by name.
    """

    tensors: dict[str, Tensor]
    settings: list[Settings]
    layers: dict[str, tuple[int, tuple[int, ...]]]
    source: dict[str, Any] | None
    metadata: dict[str, str]


def save_compact(
    model: nn.Module,
    path: str | os.PathLike,
    *,
    dtype: str = 'float32',
    source: Mapping[str, Any] | None = None,
) -> None:
    """Write a retrofitted model to a compact checkpoint.

    The file appears whole or not at all; an older one of that name is replaced.

    Args:
        model: retrofitted.
        path: of the file, best with the ending .safetensors.
        dtype: of codes, generators and the weights of convs and linear layers:
            'float32' (they stay as they are), 'float16', 'bfloat16' or 'int8', which
            has a scale for each row. Norm layers, biases and buffers stay as they are.
        source: how to build the dense network, so that the file is enough by
            itself: ``dict(builder='torchvision', name='resnet18', num_classes=10)``,
            likewise 'timm', or a builder of your own (:func:`csg_seg.register_builder`).

    Raises:
        CSGError: the model is not retrofitted, the source builds another network, a
            value does not fit the dtype, or the folder does not exist.
    """
    if source is not None:
        _check_built(build(source), model)
    write_compact(model, model.state_dict(), path, dtype=dtype, source=source)


def load_compact(
    path: str | os.PathLike, model: nn.Module | None = None, *, reset: str | Sequence[str] = ()
) -> nn.Module:
    """Load a compact checkpoint into a model, which stays as it was if they do not fit.

    Args:
        path: a file of :func:`save_compact`.
        model: the dense network, which is retrofitted as the file says, or a
            retrofitted one. On the meta device it gets the file's tensors, on the CPU.
            Without it the network is built as the file says; no
            other file is read for it, and no code that the file names is run.
        reset: patterns of layers that keep their start values where the file does not
            fit them, see :func:`csg_seg.load_state_dict`; ``model.csg.reset.layers``
            says which did.

    Returns:
        The same model, or the one built.

    Raises:
        CSGError: the file is damaged or is no compact checkpoint, its settings,
            names or shapes differ from the model's (a binary generator's seed is
            the file's), or it does not say how to build one.
    """
    compact = read_compact(path)
    patterns = read_patterns('load_compact', 'reset', reset) or ()
    try:
        if model is None:
            model = _build(compact)
        bank = find_bank(model)
        if bank is None:
            check_root(model)
            layers = _layers_in(model, compact, patterns)
            wanted = _shapes_when_retrofitted(model, layers, compact.settings)
        else:
            layers = {}
            wanted = _shapes(model, compact, patterns)
        check_reset(model, patterns)
        _check_same(_without(shapes_of(compact.tensors), patterns), _without(wanted, patterns))
        _check_values(model, compact, wanted)
        if bank is None:
            _retrofit_like(model, compact, layers)
    except CSGError as error:
        raise CSGError(f'{path}: {error}') from None
    # Modules that read older layouts of their state ask for the version of this one: it is today's.
    state_dict = model.state_dict()
    for name in [name for name in state_dict if _matches_any(name, patterns)]:
        del state_dict[name]
    state_dict.update(compact.tensors)
    with bank_of(model).reset.allow(patterns):
        _load_values(model, state_dict)
    return model


def write_compact(
    model: nn.Module,
    state_dict: Mapping[str, Tensor],
    path: str | os.PathLike,
    *,
    dtype: str = 'float32',
    source: Mapping[str, Any] | None = None,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write a state dict of a retrofitted model; see :func:`save_compact`.

    Args:
        model: tells settings and layers.
        state_dict: of this model, or of an average of it.
        path: of the file.
        dtype: as for :func:`save_compact`.
        source: likewise; it is not tried.
        metadata: notes to keep in the file, text by name.
    """
    bank = find_bank(model)
    if bank is None:
        inside = next((prefix for prefix, _, _ in find_roots(model)), None)
        if inside is not None:
            raise CSGError(f'the retrofitted network is inside this {type(model).__name__}; save model.{inside[:-1]}')
        raise CSGError(
            'nothing to compact: the model is not retrofitted; call csg_seg.retrofit on it, or use torch.save'
        )
    path = Path(path)
    if not path.parent.is_dir():
        raise CSGError(f'{path.parent}: no such folder; create it before saving {path.name}')
    if path.is_dir():
        raise CSGError(f'{path}: a folder, not a file; choose another path')
    header = {
        'versions': json.dumps({'csg_seg': __version__, 'torch': torch.__version__}),
        **(metadata or {}),
        'format': FORMAT,
        'version': VERSION,
        'dtype': dtype,
        'generators': json.dumps([generator.settings.to_dict() for generator in bank]),
        'layers': json.dumps(_layers(model)),
    }
    if source is not None:
        check_source(source)
        header['source'] = encode_source(source)
    for name, tensor in state_dict.items():
        if not isinstance(tensor, Tensor):
            raise CSGError(
                f'{name}: a {type(tensor).__name__} in the state dict, which only tensors can be; save it apart'
            )
        if tensor.is_meta:
            raise CSGError(f'{name}: on the meta device, without values to save; load some first')
    stored = {name: each for name, each in state_dict.items() if not (_is_setting(name) or _is_counter(name))}
    lowered = lower(stored, matrices(model), dtype)
    # Cloned, because safetensors refuses views and tied tensors.
    tensors = {
        name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format) for name, tensor in lowered.items()
    }
    header['sha256'] = _digest(tensors, header)
    write_whole(path, lambda partial: partial.write_bytes(save(tensors, metadata=header)))


def read_compact(path: str | os.PathLike) -> Compact:
    """Read and verify a compact checkpoint; nothing in it is ever unpickled.

    Raises:
        FileNotFoundError: there is no such file.
        CSGError: the file is damaged, or is no compact checkpoint.
    """
    if Path(path).is_dir():
        raise CSGError(f'{path}: a folder, not a compact checkpoint; name a file in it')
    if not Path(path).is_file():
        raise FileNotFoundError(f'{path}: no such file')
    try:
        with safe_open(str(path), framework='pt') as file:
            header = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no dict)
    except SafetensorError as error:
        raise CSGError(f'{path}: damaged, or no compact checkpoint ({error}); copy it again') from None
    if header.get('format') != FORMAT:
        raise CSGError(
            f'{path}: a safetensors file that csg_seg.save_compact did not write; load it as the dense file it is'
        )
    if header.get('version') not in READABLE:
        raise CSGError(
            f'{path}: version {header.get("version")} of the format; this csg_seg reads {" and ".join(READABLE)}, '
            'take the one that wrote it'
        )
    if header.pop('sha256', None) != _digest(tensors, header):
        raise CSGError(f'{path}: damaged, its checksum does not match; copy it again')
    try:
        return _parse(tensors, header)
    except CSGError as error:
        raise CSGError(f'{path}: {error}') from None
    # A header that another program wrote may hold anything.
    except (AttributeError, KeyError, OverflowError, RecursionError, TypeError, ValueError) as error:
        raise CSGError(
            f'{path}: its header is none that csg_seg writes ({type(error).__name__}); copy it again'
        ) from None


def _parse(tensors: dict[str, Tensor], header: dict[str, str]) -> Compact:
    """Read what a header says, and check it against the tensors."""
    settings = [
        Settings.from_dict(each, position=position)
        for position, each in enumerate(json.loads(header.pop('generators')))
    ]
    layers = {
        name: (_in_range(position, len(settings)), _weight_shape(shape))
        for name, (position, shape) in json.loads(header.pop('layers')).items()
    }
    for name, (position, weight_shape) in layers.items():
        if weight_shape[2:] != settings[position].kernel:
            raise CSGError(
                f'{name}: a weight of {weight_shape} and slices of {settings[position].slice_shape}; it lies'
            )
    source = decode_source(header.pop('source', 'null'))
    if source is not None:
        check_source(source)
    stored = sum(tensor.numel() for tensor in tensors.values())
    claimed = sum(each.code_dim * math.prod(each.slice_shape) for each in settings)
    claimed += sum(math.prod(shape) for _, shape in layers.values())
    if claimed > LARGEST_RATIO * stored:
        raise CSGError(f'{stored:,} values in the file cannot make {claimed:,} of weights and generators; it lies')
    tensors = {name: tensor for name, tensor in restore(tensors).items() if not _is_counter(name)}
    for position, each in enumerate(settings):
        fed = {name: shape for name, (generator, shape) in layers.items() if generator == position}
        tensors[f'{BANK}.{position}.{_EXTRA}'] = encode_signature(each, fed)
    return Compact(tensors, settings, layers, source, header)


def _in_range(position: Any, count: int) -> int:
    if type(position) is not int or not 0 <= position < count:
        raise ValueError(position)
    return position


def _weight_shape(shape: Any) -> tuple[int, ...]:
    if len(shape) not in (3, 4, 5) or not all(type(size) is int and size > 0 for size in shape):
        raise ValueError(shape)
    return tuple(shape)


def _build(compact: Compact) -> nn.Module:
    """Build the network that a file names, while it takes no more memory than the file accounts for."""
    if compact.source is None:
        raise CSGError('does not say how its network is built; give load_compact the model too')
    stored = sum(tensor.numel() for tensor in compact.tensors.values())
    dense = sum(math.prod(shape) for _, shape in compact.layers.values())
    return build(compact.source, most_values=SLACK * (stored + dense))


def _check_built(built: nn.Module, model: nn.Module) -> None:
    """Refuse a source that builds another network than the one that is saved."""
    try:
        _check_same(shapes_of(built.state_dict()), dense_shapes(model))
    except CSGError as error:
        raise CSGError(f'the source builds another network: its state dict {error}') from None


def _digest(tensors: Mapping[str, Tensor], header: Mapping[str, str]) -> str:
    sha = hashlib.sha256(json.dumps(dict(sorted(header.items()))).encode())
    for name in sorted(tensors):
        sha.update(f'{name} {tensors[name].dtype} {tuple(tensors[name].shape)}'.encode())
        sha.update(tensors[name].reshape(-1).view(torch.uint8).numpy().data)
    return sha.hexdigest()


def _shapes(model: nn.Module, compact: Compact, reset: Sequence[str]) -> dict[str, Shape]:
    """Return the shapes of a retrofitted model's state dict, once its settings are found to agree."""
    bank = find_bank(model)
    assert bank is not None
    for key in SIGNATURE:
        stored = [getattr(each, key) for each in compact.settings]
        wanted = [getattr(generator.settings, key) for generator in bank]
        if stored != wanted:
            raise CSGError(f'made with {key} {stored}, the model has {wanted}; load it into the dense network instead')
    odd = sorted(dict(_without(_layers(model), reset).items() ^ _without(compact.layers, reset).items()))
    if odd:
        raise CSGError(f'{odd[0]} is generated otherwise in the file; load it into the dense network it was made from')
    return shapes_of(model.state_dict())


def _layers_in(model: nn.Module, compact: Compact, reset: Sequence[str]) -> dict[str, tuple[int, Shape]]:
    """Return which convs of a dense model the file's generators feed, and their weights' shapes in the model."""
    convs = dict(find_convs(model, remove_duplicate=False))
    layers = {}
    for name, (position, shape) in compact.layers.items():
        own = tuple(convs[name].weight.shape) if name in convs else None
        if own != shape and not _matches_any(name, reset):
            raise CSGError(
                f'{name} is a conv of weight {shape} in the file and not in the model; '
                'load it into the network it was made from, or name the layer in reset'
            )
        if own is not None and own[2:] == compact.settings[position].kernel:
            layers[name] = (position, own)
    return layers


def _shapes_when_retrofitted(
    model: nn.Module, layers: Mapping[str, tuple[int, Shape]], settings: Sequence[Settings]
) -> dict[str, Shape]:
    """Return the state-dict shapes that a dense model will have when these layers are generated."""
    shapes = shapes_of(model.state_dict())
    everywhere = list(model.named_modules(remove_duplicate=False))
    convs = dict(everywhere)
    for name, (position, weight_shape) in layers.items():
        each = settings[position]
        rows, cols = grid(weight_shape, each.slice_shape)
        # A module that stands in two places has two names in a state dict.
        for alias in [alias for alias, module in everywhere if module is convs[name]]:
            shapes.pop(f'{alias}.weight', None)
            shapes[f'{alias}.code'] = (rows * cols, each.code_dim)
            if each.residual:
                shapes[f'{alias}.residual_out'] = (weight_shape[0], each.residual)
                shapes[f'{alias}.residual_in'] = (each.residual, math.prod(weight_shape[1:]))
    for position, each in enumerate(settings):
        state = build_generator(each, torch.Generator()).state_dict()
        shapes |= shapes_of({f'{BANK}.{position}.{name}': tensor for name, tensor in state.items()})
    return shapes


def shapes_of(state_dict: Mapping[str, Tensor]) -> dict[str, Shape]:
    """Return the shape of each entry of a state dict, but for what profilers left in it."""
    return {name: tuple(tensor.shape) for name, tensor in state_dict.items() if not _is_counter(name)}


def _is_counter(name: str) -> bool:
    """Whether a state-dict entry is a count that thop leaves in the modules that it has profiled."""
    return name.rpartition('.')[2] in ('total_ops', 'total_params')


def _matches_any(name: str, patterns: Sequence[str]) -> bool:
    return any(matches(name, pattern) for pattern in patterns)


def _without(named: Mapping[str, T], patterns: Sequence[str]) -> dict[str, T]:
    """Return the items whose names, of layers or of their entries, match none of the patterns."""
    return {name: each for name, each in named.items() if not _matches_any(name, patterns)}


def _retrofit_like(model: nn.Module, compact: Compact, layers: Mapping[str, tuple[int, Shape]]) -> None:
    left_dense = {name: Reason(Cause.DENSE_IN_FILE) for name in find_convs(model) if name not in layers}
    taken = {name: position for name, (position, _) in layers.items()}
    swap_layers(model, compact.settings, taken, left_dense)


def _load_values(model: nn.Module, state_dict: Mapping[str, Tensor]) -> None:
    """Load a state dict strictly; parameters and buffers on the meta device become its tensors."""
    own = model.state_dict()
    if not any(tensor.is_meta for tensor in own.values()):
        model.load_state_dict(state_dict)
        return
    tied = defaultdict(list)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        tied[id(parameter)].append(name)
    cast = {
        name: tensor.to(own[name].dtype) if name in own and not _is_setting(name) else tensor
        for name, tensor in state_dict.items()
    }
    model.load_state_dict(cast, assign=True)
    for first, *others in tied.values():
        for name in others:
            layer, _, key = name.rpartition('.')
            setattr(model.get_submodule(layer), key, model.get_parameter(first))


def _check_values(model: nn.Module, compact: Compact, wanted: Collection[str]) -> None:
    """Refuse a network on the meta device of which something would have no value."""
    held = {*wanted} & {*compact.tensors}
    tensors = [*model.named_parameters(), *model.named_buffers()]
    left = [name for name, each in tensors if each.is_meta and name not in held and not name.startswith(f'{BANK}.')]
    # A dense weight goes where the file has codes.
    left = [name for name in left if f'{name.removesuffix("weight")}code' not in held]
    if left:
        raise CSGError(
            f'{abridge(left)}: on the meta device, and the file holds no value for it; '
            'build the network on another device'
        )


def _layers(model: nn.Module) -> dict[str, tuple[int, tuple[int, ...]]]:
    """Return each generated layer's generator position and weight shape."""
    bank = find_bank(model)
    assert bank is not None
    position = {id(generator): index for index, generator in enumerate(bank)}
    return {name: (position[id(conv.generator)], tuple(conv.weight_shape)) for name, conv in generated_convs(model)}


def _is_setting(name: str) -> bool:
    """Whether a state-dict entry is a generator's settings, which the metadata holds."""
    return name.startswith(f'{BANK}.') and name.endswith(_EXTRA)


def _check_same(stored: Mapping[str, tuple[int, ...]], wanted: Mapping[str, tuple[int, ...]]) -> None:
    for what, names in (('lacks', wanted.keys() - stored.keys()), ('has in excess', stored.keys() - wanted.keys())):
        if names:
            raise CSGError(
                f'{what} {min(names)} ({len(names)} such entries); load it into the network it was made from'
            )
    for name, shape in wanted.items():
        if stored[name] != shape and not _is_setting(name):
            raise CSGError(
                f'{name} is {stored[name]} in the file and {shape} in the model; '
                'load it into the network it was made from'
            )
