"""The linear generator, and what all kinds of generators share."""

import math
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from csg_seg.errors import CSGError

from .lengths import row_length
from .products import multiply
from .settings import OPTIONAL, Settings
from .signature import check_signature, encode_signature


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
        """Return :func:`encode_signature` of the settings and the layers.

        A tensor, because trainers move and broadcast every value of a state dict.
        """
        return encode_signature(self.settings, self.layers)

    def set_extra_state(self, state: Tensor) -> None:
        """Refuse another generator's state.

        Raises:
            CSGError: one of the settings in ``SIGNATURE`` differs.
        """
        check_signature(self.settings, state)
