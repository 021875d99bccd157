"""What maps a code to a slice."""

import hashlib
import json
import math

import torch
from torch import Tensor, nn

from .errors import CSGError
from .settings import Settings


class Generator(nn.Module):
    """The linear Convolutional Slice Generator: ``slice = code @ weight``.

    Omidvar et al., AISTATS 2021, section 2. Its rows start nearly orthogonal and
    at :func:`row_length`, so that a dense recipe keeps its learning rate.

    Attributes:
        weight: ``(code_dim, s_out * s_in * kh * kw)``, no bias.
        settings: what the user asked for.
    """

    weight: Tensor

    def __init__(self, settings: Settings, rng: torch.Generator):
        super().__init__()
        self.settings = settings
        self._draw_weight(rng)

    def _draw_weight(self, rng: torch.Generator) -> None:
        size = math.prod(self.settings.slice_shape)
        weight = torch.empty(self.settings.code_dim, size, device='cpu')
        weight.normal_(mean=0.0, std=row_length(self.settings) / math.sqrt(size), generator=rng)
        self.weight = nn.Parameter(weight, requires_grad=not self.settings.freeze_generator)

    def forward(self, code: Tensor) -> Tensor:
        """Map codes ``(n, code_dim)`` to slices ``(n, s_out, s_in, kh, kw)``."""
        return (code @ self.weight).unflatten(1, self.settings.slice_shape)

    def code_std(self, weight_std: float) -> float:
        """Return the std of zero-mean codes whose slices have the given std.

        The variance of a slice's value is the code's variance times the squared
        norm of the value's generator column; this takes the mean over columns.
        """
        squared_norm = self.weight.detach().double().square().sum().item()
        return weight_std * math.sqrt(math.prod(self.settings.slice_shape) / squared_norm)

    def extra_repr(self) -> str:
        """Describe the generator in ``print(model)``."""
        return f'code_dim={self.settings.code_dim}, slice_shape={self.settings.slice_shape}'

    def get_extra_state(self) -> Tensor:
        """Return :func:`encode_meaning` of the settings.

        A tensor, because trainers move and broadcast every value of a state dict.
        """
        return encode_meaning(self.settings)

    def set_extra_state(self, state: Tensor) -> None:
        """Refuse another generator's state.

        Raises:
            CSGError: slice shape, code length, layout or kind differ.
        """
        check_meaning(self.settings, state)


class BinaryGenerator(Generator):
    """A frozen generator of random signs, stored as its seed.

    Omidvar et al., AISTATS 2021, "random binary CSG". The authors use +-0.5;
    here the signs are scaled to rows of :func:`row_length`, which codes absorb,
    so that it trains at the same learning rate as the linear generator.
    """

    def _draw_weight(self, rng: torch.Generator) -> None:
        self._rebuild_signs()

    def _rebuild_signs(self) -> None:
        size = math.prod(self.settings.slice_shape)
        n_bits = self.settings.code_dim * size
        # A hash, not a library's random numbers: the same bits for ever and on any device.
        digest = hashlib.shake_256(self.settings.seed.to_bytes(8, 'little')).digest(-(-n_bits // 8))
        packed = torch.frombuffer(bytearray(digest), dtype=torch.uint8)
        bits = (packed[:, None] >> torch.arange(8, device='cpu')).bitwise_and(1).flatten()[:n_bits]
        weight = (bits * 2.0 - 1.0) * sign_value(self.settings)
        self.register_buffer('weight', weight.view(self.settings.code_dim, size), persistent=False)

    def set_extra_state(self, state: Tensor) -> None:
        """Take over the seed of a stored generator and draw its signs again.

        Raises:
            CSGError: slice shape, code length, layout or kind differ.
        """
        super().set_extra_state(state)
        stored = read_meaning(state)
        if stored['seed'] != self.settings.seed:
            like = self.weight
            self.settings = Settings.from_dict({**self.settings.to_dict(), 'seed': stored['seed']})
            self._rebuild_signs()
            self.weight = self.weight.to(like)


def row_length(settings: Settings) -> float:
    """Return the length that a generator's rows start at, ``(slice values / code_dim) ** (1 / 4)``.

    A gradient step on a code moves the weight along the dense step's projection on
    the rows' span, times their squared length. The projection keeps a share
    ``code_dim / slice values`` of the squared length of a step without direction;
    this gives it back, so that a weight moves as far as the dense one would.
    """
    # Two square roots, which every machine rounds alike; a power it may not.
    return math.sqrt(math.sqrt(math.prod(settings.slice_shape) / settings.code_dim))


def sign_value(settings: Settings) -> float:
    """Return the size of every value of a binary generator, so that its rows have :func:`row_length`."""
    return row_length(settings) / math.sqrt(math.prod(settings.slice_shape))


_MEANING = ('generator', 'slice_shape', 'code_dim', 'layout')


def build_generator(settings: Settings, rng: torch.Generator) -> Generator:
    """Build the generator that the settings name; ``rng`` draws a linear one's start values."""
    return {'linear': Generator, 'binary': BinaryGenerator}[settings.generator](settings, rng)


def encode_meaning(settings: Settings) -> Tensor:
    """Encode, as JSON bytes ``(n,)`` in uint8, the settings that decide what a code means."""
    return torch.frombuffer(bytearray(json.dumps(_meaning(settings)).encode()), dtype=torch.uint8)


def read_meaning(state: Tensor) -> dict:
    """Decode what :func:`encode_meaning` wrote.

    Raises:
        CSGError: these bytes were not written by a generator.
    """
    try:
        stored = json.loads(bytes(state.tolist()))
        keys = _MEANING if stored['generator'] == 'linear' else (*_MEANING, 'value', 'seed')
        return {key: stored[key] for key in keys}
    except (ValueError, KeyError, TypeError) as error:
        raise CSGError(f"the checkpoint's generator settings are damaged ({error}); use another copy of it") from None


def check_meaning(settings: Settings, state: Tensor) -> None:
    """Compare a model's generator with the one a checkpoint was made with.

    Raises:
        CSGError: slice shape, code length, layout or kind differ.
    """
    wanted, stored = _meaning(settings), read_meaning(state)
    for key in [key for key in stored if key != 'seed']:
        if wanted.get(key) != stored[key]:
            raise CSGError(
                f'the checkpoint was made with {key}={stored[key]!r}, this model has {key}={wanted[key]!r}; '
                "set the config's csg to the checkpoint's, or take another checkpoint"
            )


def _meaning(settings: Settings) -> dict:
    meaning = {key: settings.to_dict()[key] for key in _MEANING}
    if settings.generator == 'binary':
        # Stored, so that codes are never read with signs of another size.
        meaning |= {'value': sign_value(settings), 'seed': settings.seed}
    return meaning
