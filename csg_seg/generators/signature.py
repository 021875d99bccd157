"""The settings and layers that a state dict stores with each generator."""

import json
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from csg_seg.errors import CSGError

from .kinds import KINDS
from .settings import Settings

# The settings of any generator without which its codes cannot be read.
SIGNATURE = ('generator', 'slice_shape', 'code_dim', 'layout')

LAYERS, CHECK = 'layers', 'crc32'
# The size of a binary generator's signs.
VALUE = 'value'
# No option of a kind may have one of these names.
RESERVED = {*(each.name for each in fields(Settings)), LAYERS, CHECK, VALUE}

DAMAGED = "the checkpoint's generator settings are damaged"


def encode_signature(settings: Settings, layers: Mapping[str, Sequence[int]] | None) -> Tensor:
    """Encode the settings that stored values depend on.

    Args:
        settings: of the generator.
        layers: weight shape by name, for each layer that uses the generator; None if it is in no network.

    Returns:
        JSON bytes ``(n,)``. With layers they are int32: averaging a whole state dict
        adds and scales them too, which overflows uint8.
    """
    meaning = _signature(settings)
    if layers is None:
        return _to_bytes(meaning)
    meaning[LAYERS] = {name: list(shape) for name, shape in layers.items()}
    return _to_bytes(meaning | {CHECK: _checksum(meaning)}).int()


def _to_bytes(meaning: Mapping[str, Any]) -> Tensor:
    # Files of 0.1.0 have no layers, and have spaces between entries.
    separators = (',', ':') if LAYERS in meaning else None
    return torch.frombuffer(bytearray(json.dumps(meaning, separators=separators).encode()), dtype=torch.uint8)


def _checksum(meaning: Mapping[str, Any]) -> int:
    """Return a checksum that reveals averages of different settings."""
    return zlib.crc32(json.dumps(meaning).encode())


def _read(state: Tensor) -> dict:
    """Decode the output of :func:`encode_signature`.

    Raises:
        CSGError: these bytes were not written by a generator.
    """
    try:
        # Bytes that were cast or averaged with the rest of a state dict are the same numbers up to rounding.
        stored = json.loads(bytes(round(each) for each in state.tolist()))
    except (ValueError, TypeError, OverflowError) as error:
        raise CSGError(f'{DAMAGED} ({error}); use another copy of it') from None
    check = stored.pop(CHECK, None) if isinstance(stored, dict) else None
    if check is not None and check != _checksum(stored):
        raise CSGError(f'{DAMAGED}, or it is an average of networks with different settings; use another one')
    return stored


def read_signature(state: Tensor) -> dict:
    """Return the settings in the output of :func:`encode_signature`.

    Raises:
        CSGError: these bytes were not written by a generator.
    """
    stored = _read(state)
    try:
        return {key: stored[key] for key in SIGNATURE} | {key: stored[key] for key in stored if key != LAYERS}
    except (KeyError, TypeError) as error:
        raise CSGError(f'{DAMAGED} ({error}); use another copy of it') from None


def read_layers(state: Tensor) -> dict[str, tuple[int, ...]] | None:
    """Return the layers in the output of :func:`encode_signature`; None in files of csg_seg 0.1.0 or earlier.

    Raises:
        CSGError: these bytes were not written by a generator.
    """
    stored = _read(state)
    try:
        return {name: tuple(shape) for name, shape in stored[LAYERS].items()} if LAYERS in stored else None
    except (AttributeError, TypeError) as error:
        raise CSGError(f'{DAMAGED} ({error}); use another copy of it') from None


def check_signature(settings: Settings, state: Tensor) -> None:
    """Compare a model's generator with the one in a checkpoint.

    Raises:
        CSGError: a setting other than the seed differs, or a value of the kind's ``signature_extras`` is missing.
    """
    kind = KINDS[settings.generator]
    wanted, stored, extras = _signature(settings), read_signature(state), kind.signature_extras(settings)
    # The first key is the kind.
    for key in wanted | stored:
        if key in extras and key not in stored:
            raise CSGError(f'{DAMAGED} ({key!r} is missing); use another copy of it')
        # A setting that is not stored has its default.
        default = kind.OPTIONS[key].default if key in kind.OPTIONS else getattr(Settings, key, None)
        came, want = stored.get(key, default), wanted.get(key, default)
        if came != want and key != 'seed':
            raise CSGError(
                f'the checkpoint was made with {key}={came!r}, this model has {key}={want!r}; '
                "set csg to the checkpoint's, which `csg-seg report CHECKPOINT` prints, or take another "
                'checkpoint'
            )


def _signature(settings: Settings) -> dict:
    values = settings.to_dict()
    meaning = {key: values[key] for key in (*SIGNATURE, *settings.optional)}
    return meaning | KINDS[settings.generator].signature_extras(settings)
