"""What maps a code to a slice."""

import hashlib
import json
import math
import zlib
from collections.abc import Iterator, Mapping, Sequence
from functools import reduce
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .errors import CSGError
from .products import multiply
from .settings import OPTIONAL, Settings


class Generator(nn.Module):
    """The linear Convolutional Slice Generator: ``slice = code @ weight``.

    Omidvar et al., AISTATS 2021, section 2. Its rows start nearly orthogonal and
    at :func:`row_length`, so that a dense recipe keeps its learning rate.

    Attributes:
        weight: ``(code_dim, s_out * s_in * kh * kw)``, no bias.
        settings: what the user asked for.
        layers: name of each layer that it feeds, and its weight's shape; the bank keeps them up to date. None of a
            generator that is in no network.
        is_product: whether a slice is its code times ``weight``, for this kind of generator.
    """

    weight: Tensor
    layers: Mapping[str, Sequence[int]] | None
    is_product = True

    def __init__(self, settings: Settings, rng: torch.Generator):
        super().__init__()
        self.settings = settings
        self.layers = None
        self._draw_weight(rng)

    def _draw_weight(self, rng: torch.Generator) -> None:
        size = math.prod(self.settings.slice_shape)
        weight = torch.empty(self.settings.code_dim, size, device='cpu')
        weight.normal_(mean=0.0, std=row_length(self.settings) / math.sqrt(size), generator=rng)
        self.weight = self._parameter(weight)

    def _parameter(self, values: Tensor) -> nn.Parameter:
        return nn.Parameter(values, requires_grad=not self.settings.freeze_generator)

    def named_parameters(
        self, prefix: str = '', recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield the parameters; without ``recurse`` none of a network's generator, whose root has them."""
        if recurse or not remove_duplicate or self.layers is None:
            yield from super().named_parameters(prefix, recurse, remove_duplicate)

    def forward(self, code: Tensor) -> Tensor:
        """Map codes ``(n, code_dim)`` to slices ``(n, s_out, s_in, kh, kw)``."""
        return (code @ self.weight).view(-1, *self.settings.slice_shape)

    def generate(self, codes: Sequence[Tensor]) -> Sequence[Tensor]:
        """Map several layers' codes ``(n, code_dim)`` to their slices ``(n, s_out, s_in, kh, kw)`` at once."""
        if self.is_product:
            return [each.view(-1, *self.settings.slice_shape) for each in multiply(self.weight, codes)]
        if len(codes) == 1:
            return [self(codes[0])]
        return self(torch.cat(list(codes))).split([len(code) for code in codes])

    def code_std(self, weight_std: float) -> float:
        """Return the std of zero-mean codes whose slices have the given std.

        The variance of a slice's value is the code's variance times the squared
        norm of the value's generator column; this takes the mean over columns.
        """
        squared_norm = self.weight.detach().double().square().sum().item()
        return weight_std * math.sqrt(math.prod(self.settings.slice_shape) / squared_norm)

    def draw_code(self, n: int, *, weight_std: float, rng: torch.Generator) -> Tensor:
        """Draw start codes ``(n, code_dim)`` on the CPU, whose slices have the given std."""
        code = torch.empty(n, self.settings.code_dim, device='cpu')
        return code.normal_(mean=0.0, std=self.code_std(weight_std), generator=rng)

    def set_linear(self, basis: Tensor) -> None:
        """Make the generator ``slice = code @ basis``, in place.

        Args:
            basis: ``(code_dim, s_out * s_in * kh * kw)``.

        Raises:
            CSGError: the shape is another, or this kind of generator has no linear part to set.
        """
        kind, wanted = self.settings.generator, (self.settings.code_dim, math.prod(self.settings.slice_shape))
        if kind not in ('linear', 'mlp'):
            raise CSGError(f"a {kind} generator cannot be set to a basis; use generator='linear' or 'mlp'")
        if basis.shape != wanted:
            raise CSGError(f'a basis of shape {tuple(basis.shape)} came, this generator wants {wanted}')
        with torch.no_grad():
            self.weight.zero_()
            self.weight[: len(basis)] = basis

    def is_linear(self) -> bool:
        """Say whether slices are codes times the first ``code_dim`` rows of ``weight``, as the generator is now."""
        return True

    def extra_repr(self) -> str:
        """Describe the generator in ``print(model)``."""
        settings = self.settings.to_dict()
        extras = [f'{key}={settings[key]}' for key in OPTIONAL if key in settings]
        return ', '.join([f'code_dim={self.settings.code_dim}', f'slice_shape={self.settings.slice_shape}', *extras])

    def get_extra_state(self) -> Tensor:
        """Return :func:`encode_meaning` of the settings and the layers.

        A tensor, because trainers move and broadcast every value of a state dict.
        """
        return encode_meaning(self.settings, self.layers)

    def set_extra_state(self, state: Tensor) -> None:
        """Refuse another generator's state.

        Raises:
            CSGError: one of the settings in ``MEANING`` differs.
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
            CSGError: one of the settings in ``MEANING`` differs.
        """
        super().set_extra_state(state)
        stored, like = read_meaning(state), self.weight
        if stored['seed'] != self.settings.seed:
            self.settings = Settings.from_dict({**self.settings.to_dict(), 'seed': stored['seed']})
        # Whatever the seed: no state dict holds the signs, and ``to_empty`` leaves none.
        self._rebuild_signs()
        self.weight = self.weight.to(like.dtype if like.is_meta else like)


class MLPGenerator(Generator):
    """A non-linear generator: ``slice = [code, relu(code @ hidden_weight + hidden_bias)] @ weight``.

    The future work that Omidvar et al., AISTATS 2021, name. The hidden units' rows
    of ``weight`` start at zero: the start is a linear generator, at its variance and
    with its pace of learning, and so is any that :meth:`Generator.set_linear` made.
    Frozen there, it stays one: freeze a trained one only.

    Steps on those rows must not run away: relu has a positive mean, so all slices
    share what the hidden units learn, and the units' paces add up. For codes of
    unit variance and nearly orthogonal columns of length ``l``, ``E[h h^T]`` holds
    ``l^2 / 2`` on its diagonal and ``l^2 / (2 pi)`` elsewhere (Cho and Saul, NeurIPS 2009).
    Its largest eigenvalue is 1, that of the codes themselves, for
    ``l^2 = 2 pi / (hidden + pi - 1)``, at which the columns start.

    Attributes:
        weight: ``(code_dim + hidden, s_out * s_in * kh * kw)``.
        hidden_weight: ``(code_dim, hidden)``.
        hidden_bias: ``(hidden,)``, zero at the start.
    """

    is_product = False

    def _draw_weight(self, rng: torch.Generator) -> None:
        super()._draw_weight(rng)
        code_dim, hidden = self.settings.code_dim, self.settings.hidden
        assert hidden is not None
        columns = torch.empty(code_dim, hidden, device='cpu')
        length = math.sqrt(2 * math.pi / (hidden + math.pi - 1))
        columns.normal_(mean=0.0, std=length / math.sqrt(code_dim), generator=rng)
        self.weight = self._parameter(F.pad(self.weight.detach(), (0, 0, 0, hidden)))
        self.hidden_weight = self._parameter(columns)
        self.hidden_bias = self._parameter(torch.zeros(hidden, device='cpu'))

    def is_linear(self) -> bool:
        """Say whether the hidden units give nothing yet."""
        return not self.weight[self.settings.code_dim :].any()

    def forward(self, code: Tensor) -> Tensor:
        """Map codes ``(n, code_dim)`` to slices ``(n, s_out, s_in, kh, kw)``."""
        hidden = F.relu(code @ self.hidden_weight + self.hidden_bias)
        return super().forward(torch.cat((code, hidden), dim=1))


class TensorRingGenerator(Generator):
    """Slices as tensor rings over shared basis tensors.

    Obukhov et al., "T-Basis: a Compact Representation for Neural Networks", ICML
    2020. The index of a slice's value, written with ``K = settings.cores`` digits in
    base ``mode``, picks one matrix of each core by its digits ``i_1 ... i_K``:
    ``value = trace(C_1[i_1] ... C_K[i_K])``, ``C_k = scale * sum_b code[k, b] * weight[b]``.
    Indices from the slice's size on are cropped.

    Not carried over: there a ring makes a layer's whole weight, a digit stands for
    an output and an input channel's digit together, and rank adapters (``rank``
    factors for each core, stored beside the coefficients) scale the cores.

    A product of cores leaves its start free but for the product's size. Codes and
    basis start so that both keep the linear generator's pace: see :meth:`_scale`.

    Attributes:
        weight: ``(basis tensors, rank, mode, rank)``; their number is ``code_dim / K``.
    """

    is_product = False

    def _draw_weight(self, rng: torch.Generator) -> None:
        rank, mode, cores = self._ring()
        weight = torch.empty(self.settings.code_dim // cores, rank, mode, rank, device='cpu')
        std = cores * row_length(self.settings) / (rank * math.sqrt(mode))
        self.weight = self._parameter(weight.normal_(mean=0.0, std=std, generator=rng))

    def _ring(self) -> tuple[int, int, int]:
        rank, mode = self.settings.rank, self.settings.mode
        assert rank is not None and mode is not None
        return rank, mode, self.settings.cores

    def _scale(self) -> float:
        """Return the fixed factor on codes that sets the pace of learning.

        Let slices of ``size`` values have std ``s``, codes ``c``, the entries of ``B`` basis
        tensors ``t``. The slice's derivative by an entry of its code has the squared
        length ``size * s^2 / (B * c^2)``, by an entry of the basis
        ``K * size * s^2 / (B * rank^2 * mode * t^2)``. The first is the square of
        :func:`row_length`, the second what it is for a linear generator of that
        code length, if ``c = s * sqrt(size / B) / row_length`` and a basis tensor is
        ``K * row_length`` long; the factor follows from ``s = (scale * c * t * sqrt(B * rank))^K``.
        ``s`` is that of a layer as wide as a slice; codes of wider layers, whose
        weights are smaller, move less.
        """
        rank, mode, cores = self._ring()
        s_out, _, *kernel = self.settings.slice_shape
        weight_std = math.sqrt(2.0 / (s_out * math.prod(kernel)))
        size = math.prod(self.settings.slice_shape)
        return math.sqrt(rank * mode / size) / cores * weight_std ** (1 / cores - 1)

    def is_linear(self) -> bool:
        """Return False: a slice is a product of its code's parts."""
        return False

    def forward(self, code: Tensor) -> Tensor:
        """Map codes ``(n, code_dim)`` to slices ``(n, s_out, s_in, kh, kw)``."""
        cores, size = self.settings.cores, math.prod(self.settings.slice_shape)
        rank, mode, _ = self._ring()
        basis = self.weight.flatten(1)
        # Products rather than einsum, and sizes from the settings: TorchScript's ONNX has no einsum before
        # opset 12, and rounds towards zero what is computed with a tensor's shape.
        ring = [(part @ basis).view(-1, rank, mode, rank) for part in (code * self._scale()).chunk(cores, dim=1)]
        left, right = reduce(_merge, ring[: cores // 2]), reduce(_merge, ring[cores // 2 :])
        # Cropped as far as can be before the largest product.
        left = left[:, :, : -(-size // mode ** (cores - cores // 2))]
        values = left.transpose(1, 2).flatten(2) @ right.permute(0, 3, 1, 2).flatten(1, 2)
        return values.flatten(1)[:, :size].reshape(-1, *self.settings.slice_shape)

    def code_std(self, weight_std: float) -> float:
        """Return the std of zero-mean codes whose slices have the given std.

        A value sums products of ``K`` independent coefficients: its variance goes
        with the ``K``-th power of theirs.
        """
        return (weight_std / math.sqrt(self._mean_square())) ** (1 / self.settings.cores) / self._scale()

    def draw_code(self, n: int, *, weight_std: float, rng: torch.Generator) -> Tensor:
        """Draw start codes ``(n, code_dim)`` on the CPU, whose slices have the given std.

        The coefficients of each core have one length. If it varied, a product of
        ``K`` lengths would leave a few slices far above all others.
        """
        cores = self.settings.cores
        code = torch.empty(n, cores, self.settings.code_dim // cores, device='cpu')
        directions = F.normalize(code.normal_(mean=0.0, std=1.0, generator=rng), dim=2)
        return directions.flatten(1) * (self.code_std(weight_std) * math.sqrt(code.shape[2]))

    def _mean_square(self) -> float:
        """Return the mean square of a slice's values for coefficients of unit variance.

        That of one value is ``trace(M[i_1] ... M[i_K])``, ``M[i] = sum_b T_b[i] (x) T_b[i]``; the sum
        over all indices below the slice's size is taken digit by digit, the last one first.
        """
        # float64: the powers of the cores span many magnitudes.
        basis = self.weight.detach().double()
        by_digit = torch.einsum('bpiq,bsit->ipsqt', basis, basis).flatten(3).flatten(1, 2)
        size, mode = math.prod(self.settings.slice_shape), len(by_digit)
        up_to_last = every = torch.eye(by_digit.shape[1], dtype=torch.float64, device=basis.device)
        for place in range(self.settings.cores):
            digit = (size - 1) // mode**place % mode
            up_to_last = by_digit[:digit].sum(dim=0) @ every + by_digit[digit] @ up_to_last
            every = by_digit.sum(dim=0) @ every
        return up_to_last.trace().item() / size


def _merge(left: Tensor, right: Tensor) -> Tensor:
    """Merge two cores ``(n, p, i, q)`` and ``(n, q, j, r)`` into one ``(n, p, i * j, r)``."""
    merged = left.flatten(1, 2) @ right.flatten(2, 3)
    return merged.view(left.shape[0], left.shape[1], -1, right.shape[3])


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


MEANING = ('generator', 'slice_shape', 'code_dim', 'layout', *OPTIONAL)
LAYERS, CHECK = 'layers', 'crc32'
DAMAGED = "the checkpoint's generator settings are damaged"

_KINDS = {
    'linear': Generator,
    'binary': BinaryGenerator,
    'mlp': MLPGenerator,
    'tensor_ring': TensorRingGenerator,
}


def build_generator(settings: Settings, rng: torch.Generator) -> Generator:
    """Build the generator that the settings name; ``rng`` draws its start values, unless it is binary."""
    return _KINDS[settings.generator](settings, rng)


def encode_meaning(settings: Settings, layers: Mapping[str, Sequence[int]] | None) -> Tensor:
    """Encode what decides the meaning of a layer's stored values.

    Args:
        settings: of the generator.
        layers: name of each layer that it feeds, and its weight's shape; None of a generator in no network.

    Returns:
        JSON bytes ``(n,)``, with layers in int32: whoever averages a state dict as a whole adds and scales them too,
        which uint8 has no room for.
    """
    meaning = _meaning(settings)
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
    """Decode what :func:`encode_meaning` wrote.

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


def read_meaning(state: Tensor) -> dict:
    """Return the settings that :func:`encode_meaning` wrote.

    Raises:
        CSGError: these bytes were not written by a generator.
    """
    stored = _read(state)
    try:
        required = [key for key in MEANING if key not in OPTIONAL]
        required += ['value', 'seed'] if stored['generator'] == 'binary' else []
        return {key: stored[key] for key in required} | {key: stored[key] for key in OPTIONAL if key in stored}
    except (KeyError, TypeError) as error:
        raise CSGError(f'{DAMAGED} ({error}); use another copy of it') from None


def read_layers(state: Tensor) -> dict[str, tuple[int, ...]] | None:
    """Return the layers that :func:`encode_meaning` wrote; None if csg_seg 0.1.0 or earlier did, which wrote none.

    Raises:
        CSGError: these bytes were not written by a generator.
    """
    stored = _read(state)
    try:
        return {name: tuple(shape) for name, shape in stored[LAYERS].items()} if LAYERS in stored else None
    except (AttributeError, TypeError) as error:
        raise CSGError(f'{DAMAGED} ({error}); use another copy of it') from None


def check_meaning(settings: Settings, state: Tensor) -> None:
    """Compare a model's generator with the one a checkpoint was made with.

    Raises:
        CSGError: one of the settings in ``MEANING`` differs.
    """
    wanted, stored = _meaning(settings), read_meaning(state)
    for key in [key for key in wanted | stored if key != 'seed']:
        # A setting that is not stored has its default.
        came, want = (each.get(key, getattr(Settings, key, None)) for each in (stored, wanted))
        if came != want:
            raise CSGError(
                f'the checkpoint was made with {key}={came!r}, this model has {key}={want!r}; '
                "set the config's csg to the checkpoint's, or take another checkpoint"
            )


def _meaning(settings: Settings) -> dict:
    values = settings.to_dict()
    meaning = {key: values[key] for key in MEANING if key in values}
    if settings.generator == 'binary':
        # Stored, so that codes are never read with signs of another size.
        meaning |= {'value': sign_value(settings), 'seed': settings.seed}
    return meaning
