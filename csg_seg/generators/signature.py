"""What a state dict says of the generators that it holds."""

import json
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from csg_seg.errors import CSGError

from .lengths import sign_value
from .settings import OPTIONAL, Settings

SIGNATURE = ('generator', 'slice_shape', 'code_dim', 'layout', *OPTIONAL)

LAYERS, CHECK = 'layers', 'crc32'

DAMAGED = "the checkpoint's generator settings are damaged"


def encode_signature(settings: Settings, layers: Mapping[str, Sequence[int]] | None) -> Tensor:
    """Encode what decides the meaning of a layer's stored values.

    Args:
        settings: of the generator.
        layers: name of each layer that it feeds, and its weight's shape; None of a generator in no network.

    Returns:
        JSON bytes ``(n,)``, with layers in int32: whoever averages a state dict as a whole adds and scales them too,
        which uint8 has no room for.
    """
    meaning = _signature(settings)
    if layers is None:
        return _to_bytes(meaning)
    meaning[LAYERS] = {name: list(shape) for name, shape in layers.items()}
    return _to_bytes(meaning | {CHECK: _checksum(meaning)}).int()


def _to_bytes(meaning: Mapping[str, Any]) -> Tensor:
    # Spaces between entries are as in files of 0.1.0, which have no layers.
    separators = (',', ':') if LAYERS in meaning else None
    return torch.frombuffer(bytearray(json.dumps(meaning, separators=separators).encode()), dtype=torch.uint8)


def _checksum(meaning: Mapping[str, Any]) -> int:
    """Return by what an average of different settings is told from settings."""
    return zlib.crc32(json.dumps(meaning).encode())


def _read(state: Tensor) -> dict:
    """Decode what :func:`encode_signature` wrote.

    Raises:
        CSGError: these bytes were not written by a generator.
    """
    try:
        # Bytes that were cast or averaged with all else in a state dict are the same numbers, but for rounding.
        stored = json.loads(bytes(round(each) for each in state.tolist()))
    except (ValueError, TypeError, OverflowError) as error:
        raise CSGError(f'{DAMAGED} ({error}); use another copy of it') from None
    check = stored.pop(CHECK, None) if isinstance(stored, dict) else None
    if check is not None and check != _checksum(stored):
        raise CSGError(f'{DAMAGED}, or it is an average of networks with different settings; use another one')
    return stored


def read_signature(state: Tensor) -> dict:
    """Return the settings that :func:`encode_signature` wrote.

    Raises:
        CSGError: these bytes were not written by a generator.
    """
    stored = _read(state)
    try:
        required = [key for key in SIGNATURE if key not in OPTIONAL]
        required += ['value', 'seed'] if stored['generator'] == 'binary' else []
        return {key: stored[key] for key in required} | {key: stored[key] for key in OPTIONAL if key in stored}
    except (KeyError, TypeError) as error:
        raise CSGError(f'{DAMAGED} ({error}); use another copy of it') from None


def read_layers(state: Tensor) -> dict[str, tuple[int, ...]] | None:
    """Return the layers that :func:`encode_signature` wrote; None if csg_seg 0.1.0 or earlier did, which wrote none.

    Raises:
        CSGError: these bytes were not written by a generator.
    """
    stored = _read(state)
    try:
        return {name: tuple(shape) for name, shape in stored[LAYERS].items()} if LAYERS in stored else None
    except (AttributeError, TypeError) as error:
        raise CSGError(f'{DAMAGED} ({error}); use another copy of it') from None


def check_signature(settings: Settings, state: Tensor) -> None:
    """Compare a model's generator with the one a checkpoint was made with.

    Raises:
        CSGError: one of the settings in ``SIGNATURE`` differs.
    """
    wanted, stored = _signature(settings), read_signature(state)
    for key in [key for key in wanted | stored if key != 'seed']:
        # A setting that is not stored has its default.
        came, want = (each.get(key, getattr(Settings, key, None)) for each in (stored, wanted))
        if came != want:
            raise CSGError(
                f'the checkpoint was made with {key}={came!r}, this model has {key}={want!r}; '
                "set the config's csg to the checkpoint's, or take another checkpoint"
            )


def _signature(settings: Settings) -> dict:
    values = settings.to_dict()
    meaning = {key: values[key] for key in SIGNATURE if key in values}
    if settings.generator == 'binary':
        # Stored, so that codes are never read with signs of another size.
        meaning |= {'value': sign_value(settings), 'seed': settings.seed}
    return meaning
