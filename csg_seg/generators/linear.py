"""The linear generator, which is the base class of all others."""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from csg_seg.errors import CSGError

from .kinds import Option
from .lengths import row_length
from .products import multiply
from .settings import Settings
from .signature import check_signature, encode_signature


class Generator(nn.Module):
    """The linear Convolutional Slice Generator: ``slice = code @ weight``.

    Omidvar et al., AISTATS 2021, section 2. Its rows start nearly orthogonal and
    with :func:`row_length`, so a dense recipe keeps its learning rate.

    Attributes:
        OPTIONS: the keys that this kind adds to ``csg``.
        always_frozen: whether only codes train.
        is_product: whether a slice is always ``code @ weight``. Overriding :meth:`forward` makes it False.
        has_linear_part: whether :meth:`set_linear` works. Overriding :meth:`forward` makes it False,
            unless the class sets it.
        weight: ``(code_dim, s_out * s_in * kh * kw)``, no bias.
        settings: the user's settings.
        layers: weight shape by name, for each layer that uses the generator; the bank keeps it
            up to date. None if the generator is in no network.
    """

    OPTIONS: ClassVar[Mapping[str, Option]] = {}
    always_frozen: ClassVar[bool] = False
    is_product: ClassVar[bool] = True
    has_linear_part: ClassVar[bool] = True
    weight: Tensor
    layers: Mapping[str, Sequence[int]] | None

    def __init_subclass__(cls, **kwargs: Any):
        super().__init_subclass__(**kwargs)
        if 'forward' in vars(cls):
            cls.is_product = False
            cls.has_linear_part = vars(cls).get('has_linear_part', False)

    def __init__(self, settings: Settings, rng: torch.Generator):
        super().__init__()
        self.settings = settings
        self.layers = None
        self.draw_weight(rng)

    @classmethod
    def check_settings(cls, settings: Settings) -> None:
        """Check constraints between settings; override it to raise :class:`CSGError`."""

    @classmethod
    def signature_extras(cls, settings: Settings) -> dict[str, Any]:
        """Return JSON-ready values to store with the settings; loading requires all but ``seed`` to be equal."""
        return {}

    def draw_weight(self, rng: torch.Generator) -> None:
        """Set ``weight`` to its start values on the CPU, drawn with ``rng``."""
        size = math.prod(self.settings.slice_shape)
        weight = torch.empty(self.settings.code_dim, size, device='cpu')
        weight.normal_(mean=0.0, std=row_length(self.settings) / math.sqrt(size), generator=rng)
        self.weight = self.new_parameter(weight)

    def reset_parameters(self) -> None:
        """Draw new start values, in place, as torch's layers do; a frozen generator keeps its values."""
        new = type(self)(self.settings, new_rng())
        with torch.no_grad():
            for own, drawn in zip(self.parameters(), new.parameters(), strict=True):
                if own.requires_grad:
                    own.copy_(drawn)

    def new_parameter(self, values: Tensor) -> nn.Parameter:
        """Return values as a parameter, trainable unless the settings freeze the generator."""
        return nn.Parameter(values, requires_grad=not self.settings.freeze_generator)

    def named_parameters(
        self, prefix: str = '', recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield the parameters; in a network nothing without ``recurse``, because the root lists them as its own."""
        if recurse or not remove_duplicate or self.layers is None:
            yield from super().named_parameters(prefix, recurse, remove_duplicate)

    def forward(self, code: Tensor) -> Tensor:
        """Map codes ``(n, code_dim)`` to slices ``(n, s_out, s_in, kh, kw)``."""
        return (code @ self.weight).view(-1, *self.settings.slice_shape)

    def generate(self, codes: Sequence[Tensor]) -> Sequence[Tensor]:
        """Map the codes ``(n, code_dim)`` of several layers to their slices ``(n, s_out, s_in, kh, kw)`` at once."""
        if self.is_product and not has_hooks(self):
            return [each.view(-1, *self.settings.slice_shape) for each in multiply(self.weight, codes)]
        if len(codes) == 1:
            return [self(codes[0])]
        return self(torch.cat(list(codes))).split([len(code) for code in codes])

    def code_std(self, weight_std: float) -> float:
        """Return the std of zero-mean codes whose slices have the given std.

        The variance of a slice's value is the code's variance times the squared norm
        of the value's column in ``weight``. This uses the mean over columns.
        """
        squared_norm = self.weight.detach().double().square().sum().item()
        return weight_std * math.sqrt(math.prod(self.settings.slice_shape) / squared_norm)

    def draw_code(self, n: int, *, weight_std: float, rng: torch.Generator) -> Tensor:
        """Draw start codes ``(n, code_dim)`` on the CPU; their slices have the given std."""
        code = torch.empty(n, self.settings.code_dim, device='cpu')
        return code.normal_(mean=0.0, std=self.code_std(weight_std), generator=rng)

    def set_linear(self, basis: Tensor) -> None:
        """Make the generator ``slice = code @ basis``, in place.

        Args:
            basis: ``(code_dim, s_out * s_in * kh * kw)``.

        Raises:
            CSGError: the shape differs, or this kind of generator has no linear part.
        """
        kind, wanted = self.settings.generator, (self.settings.code_dim, math.prod(self.settings.slice_shape))
        if not self.has_linear_part:
            raise CSGError(f"a {kind} generator cannot be set to a basis; use generator='linear'")
        if basis.shape != wanted:
            raise CSGError(f'this generator needs a basis of shape {wanted}, got {tuple(basis.shape)}')
        with torch.no_grad():
            self.weight.zero_()
            self.weight[: len(basis)] = basis

    def is_linear(self) -> bool:
        """Say whether a slice currently is its code times the first ``code_dim`` rows of ``weight``."""
        return self.is_product

    def extra_repr(self) -> str:
        """Describe the generator in ``print(model)``."""
        options = [f'{key}={value}' for key, value in self.settings.optional.items()]
        return ', '.join([f'code_dim={self.settings.code_dim}', f'slice_shape={self.settings.slice_shape}', *options])

    def get_extra_state(self) -> Tensor:
        """Return :func:`encode_signature` of the settings and the layers.

        It is a tensor because trainers move and broadcast every value of a state dict.
        """
        return encode_signature(self.settings, self.layers)

    def set_extra_state(self, state: Tensor) -> None:
        """Refuse the state of a different generator.

        Raises:
            CSGError: a setting other than the seed differs.
        """
        check_signature(self.settings, state)


def has_hooks(module: nn.Module) -> bool:
    """Whether calling a module does more than its ``forward``, as with ``torch.nn.utils.prune``."""
    names = ('_forward_pre_hooks', '_forward_hooks', '_backward_pre_hooks', '_backward_hooks')
    return any(getattr(module, name) for name in names)


def new_rng() -> torch.Generator:
    """Return a generator of random numbers on the CPU, seeded from torch's own."""
    return torch.Generator().manual_seed(int(torch.randint(2**62, (), device='cpu')))
