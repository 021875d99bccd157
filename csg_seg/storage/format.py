"""The compact checkpoint file: what it holds, how it is written, and how it is read and verified.

It is one safetensors file. Tensors have their state-dict names, and matrices may have lower precision. The metadata
holds ``generators`` (JSON, a list of settings), ``layers`` (JSON, generator position and weight shape by layer name),
``source`` (how to build the network) and a SHA-256 of everything. A binary generator is stored as its seed, in the
metadata. A file may come from anywhere: its claims are checked before memory is allocated for them.
"""

import json
import math
import os
import warnings
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from csg_seg.errors import CSGError, CSGWarning
from csg_seg.files import write_whole
from csg_seg.generators.settings import Settings
from csg_seg.generators.signature import encode_signature
from csg_seg.layers.bank import BANK

from .builders import check_form, decode_source
from .digest import digest
from .precision import restore
from .updates import Content, Update, apply_update, find_difference

# Version 1 had binary generators with other values. Version 2 had neither source nor dtype; it can still be read.
# Version 4 is an update of another file; whole files are still written as version 3.
FORMAT, VERSION, UPDATE, READABLE = 'csg_seg compact checkpoint', '3', '4', ('2', '3', '4')
# The weights and generators that a file claims may hold at most this many times the values stored in it.
LARGEST_RATIO = 1000
# An update that holds more of the bytes than this is hardly worth its base.
LARGEST_SHARE = 0.8
Shape = tuple[int, ...]
Layers = dict[str, tuple[int, Shape]]
_EXTRA = '_extra_state'


@dataclass(frozen=True)
class Compact:
    """The content of a compact checkpoint.

    Attributes:
        tensors: the state dict of the retrofitted root, generator settings included.
        settings: one for each generator.
        layers: the position of its generator and the shape of its weight, by name of each generated layer.
        source: for :func:`csg_seg.storage.builders.build`, if the file says how to build the network.
        metadata: everything else that the writer noted, text by name.
    """

    tensors: dict[str, Tensor]
    settings: list[Settings]
    layers: Layers
    source: dict[str, Any] | None
    metadata: dict[str, str]


def write_file(
    path: Path, tensors: Mapping[str, Tensor], header: Mapping[str, str], base: Content | None = None
) -> None:
    """Write tensors and metadata with format, version and checksum; the file appears whole or not at all.

    Args:
        path: the file.
        tensors: in the file's precision.
        header: text by name.
        base: another compact checkpoint; only what differs from it is written, with its name and checksum.
    """
    # Cloned, because safetensors refuses views and tied tensors.
    cloned = {name: each.detach().cpu().clone(memory_format=torch.contiguous_format) for name, each in tensors.items()}
    header = dict(header)
    version = VERSION
    if base is not None:
        whole = sum(each.nbytes for each in cloned.values())
        cloned, update = find_difference(cloned, header, base)
        header, version = update.to_header(), UPDATE
        share = sum(each.nbytes for each in cloned.values()) / whole
        if share > LARGEST_SHARE:
            warnings.warn(
                f'{share:.0%} of the network differs from {base.name}, so the update saves little; leave base out, or '
                'give one of the same network in the same precision',
                CSGWarning,
                stacklevel=4,
            )
    header |= {'format': FORMAT, 'version': version}
    header['sha256'] = digest(cloned, header)
    write_whole(path, lambda partial: partial.write_bytes(save(cloned, metadata=header)))


def read_compact(path: str | os.PathLike, base: str | os.PathLike | None = None) -> Compact:
    """Read and verify a compact checkpoint; nothing in it is ever unpickled.

    Args:
        path: the file. Of an update, the base is read too.
        base: of an update, if it is not in the same folder under its original name.

    Raises:
        FileNotFoundError: there is no such file.
        CSGError: the file is damaged, or is not a compact checkpoint, or its base is missing or another file.
    """
    return parse(path, read_content(path, base))


def parse(path: str | os.PathLike, content: Content) -> Compact:
    """Return what a file says.

    Raises:
        CSGError: tensors and metadata disagree, or another program wrote them.
    """
    try:
        return _parse(content.tensors, dict(content.header))
    except CSGError as error:
        raise CSGError(f'{path}: {error}') from None
    # A header that another program wrote may hold anything.
    except (AttributeError, LookupError, OverflowError, RecursionError, TypeError, ValueError) as error:
        raise CSGError(f'{path}: its header cannot be read ({type(error).__name__}); copy it again') from None


def read_content(path: str | os.PathLike, base: str | os.PathLike | None = None) -> Content:
    """Read a compact checkpoint as it is in its file, an update applied to its base; see :func:`read_compact`."""
    content = _read_file(path)
    if content.header.pop('version') == UPDATE:
        return _apply_to_base(Path(path), content, base)
    if base is not None:
        raise CSGError(f'{path}: a whole compact checkpoint, not an update; leave out the base {base}')
    return content


def read_base(path: str | os.PathLike) -> Content:
    """Read a compact checkpoint that is to be the base of an update.

    Raises:
        CSGError: as :func:`read_compact`, or it is an update itself.
    """
    content = _read_file(path)
    if content.header.pop('version') == UPDATE:
        raise CSGError(f'{path}: itself an update; take its base, a whole compact checkpoint')
    return content


def _read_file(path: str | os.PathLike) -> Content:
    """Read and verify one file; the header still has its version."""
    if not isinstance(path, (str, os.PathLike)):
        raise CSGError(f'give the path of a compact checkpoint; got an object of type {type(path).__name__}')
    if Path(path).is_dir():
        raise CSGError(f'{path}: a folder, not a compact checkpoint; give a file in it')
    if not Path(path).is_file():
        raise FileNotFoundError(f'{path}: no such file')
    try:
        with safe_open(str(path), framework='pt') as file:
            header = file.metadata() or {}
            # Copied: the file may be written to while the tensors are in use.
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118 (not a dict)
    except SafetensorError as error:
        remedy = 'load it with torch.load' if zipfile.is_zipfile(path) else 'copy it again'
        raise CSGError(f'{path}: damaged, or not a compact checkpoint ({error}); {remedy}') from None
    if header.get('format') != FORMAT:
        raise CSGError(f'{path}: not written by csg_seg.save_compact; load it as an ordinary safetensors file')
    if header.get('version') not in READABLE:
        raise CSGError(
            f'{path}: has version {header.get("version")} of the format, but this csg_seg reads '
            f'{", ".join(READABLE)}; use the csg_seg that wrote it'
        )
    sha256 = header.pop('sha256', None)
    if sha256 is None or sha256 != digest(tensors, header):
        raise CSGError(f'{path}: damaged, its checksum does not match; copy it again')
    del header['format']
    return Content(tensors, header, sha256, Path(path).name)


def _apply_to_base(path: Path, content: Content, base: str | os.PathLike | None) -> Content:
    """Read the base of an update, and apply the update to it."""
    try:
        update = Update.from_header(content.header)
    except (AttributeError, LookupError, RecursionError, TypeError, ValueError) as error:
        raise CSGError(f'{path}: its header cannot be read ({type(error).__name__}); copy it again') from None
    file = path.with_name(update.base_name) if base is None else Path(base)
    called = f'{path}: an update of {update.base_name} with checksum {update.base[:12]}'
    if base is None and not file.is_file():
        raise CSGError(f'{called}, which is not beside it; copy that file there, or call load_compact with base')
    try:
        return apply_update(content.tensors, update, read_base(file))
    except CSGError as error:
        raise CSGError(f'{called}; {file}: {str(error).removeprefix(f"{file}: ")}') from None


def is_setting(name: str) -> bool:
    """Whether a state-dict entry holds a generator's settings, which a file has in its metadata."""
    return name.startswith(f'{BANK}.') and name.endswith(_EXTRA)


def is_counter(name: str) -> bool:
    """Whether a state-dict entry is a count that thop leaves in the modules it has profiled."""
    return name.rpartition('.')[2] in ('total_ops', 'total_params')


def _parse(tensors: dict[str, Tensor], header: dict[str, str]) -> Compact:
    """Read the metadata, and check it against the tensors."""
    settings = [
        Settings.from_dict(each, position=position)
        for position, each in enumerate(json.loads(header.pop('generators')))
    ]
    layers = {name: (position, tuple(shape)) for name, (position, shape) in json.loads(header.pop('layers')).items()}
    for name, (position, shape) in layers.items():
        if type(position) is not int or position < 0 or not all(type(size) is int and size > 0 for size in shape):
            raise ValueError(name)
        if shape[2:] != settings[position].kernel:
            raise CSGError(
                f'{name}: a weight of {shape} cannot be made from slices of {settings[position].slice_shape}; '
                'copy the file again'
            )
    source = decode_source(header.pop('source', 'null'))
    if source is not None:
        check_form(source)
    stored = sum(tensor.numel() for tensor in tensors.values())
    claimed = sum(each.code_dim * math.prod(each.slice_shape) for each in settings)
    claimed += sum(math.prod(shape) for _, shape in layers.values())
    if claimed > LARGEST_RATIO * stored:
        raise CSGError(
            f'header and tensors disagree: {stored:,} stored values cannot make {claimed:,} of weights and generators'
        )
    tensors = {name: tensor for name, tensor in restore(tensors).items() if not is_counter(name)}
    for position, each in enumerate(settings):
        shapes = {name: shape for name, (generator, shape) in layers.items() if generator == position}
        tensors[f'{BANK}.{position}.{_EXTRA}'] = encode_signature(each, shapes)
    return Compact(tensors, settings, layers, source, header)
