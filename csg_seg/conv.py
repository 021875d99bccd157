"""The generated convolution, and the bank of generators that feeds it."""

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from .errors import CSGError
from .generator import Generator, check_meaning, row_length
from .slices import grid, join

BANK = 'csg'


class CSGConv2d(nn.Conv2d):
    """A conv whose weight is generated from codes at each forward pass.

    Never built, only swapped in for an ``nn.Conv2d`` by :func:`swap_in`, so that
    names, hooks, stride, padding, dilation and bias stay as they are. ``weight``
    is None: initialisers of mmengine pass it by, all others fail loudly.

    Attributes:
        code: ``(rows * cols, code_dim)``, one code for each slice of the grid.
        residual_out: ``(out, residual)``, only if the settings ask for a residual.
        residual_in: ``(residual, in * kh * kw)``, likewise.
        generator: shared by many convs and registered on the model's root alone.
    """

    code: nn.Parameter
    residual_out: nn.Parameter
    residual_in: nn.Parameter
    generator: Generator

    @property
    def weight_shape(self) -> torch.Size:
        """``(out, in, kh, kw)`` of the generated weight."""
        return torch.Size((self.out_channels, self.in_channels, *self.kernel_size))

    def stored(self) -> dict[str, nn.Parameter]:
        """Return, by name, the parameters that stand in for the weight."""
        names = ('code', 'residual_out', 'residual_in') if self.generator.settings.residual else ('code',)
        return {name: getattr(self, name) for name in names}

    def generate_weight(self) -> Tensor:
        """Return the weight ``(out, in, kh, kw)`` of the current code, generator and residual."""
        # Half-precision generation nearly doubles the rounding error: let the conv cast instead.
        with torch.autocast(self.code.device.type, enabled=False):
            slices = self.generator(self.code)
            weight = join(slices, self.weight_shape, layout=self.generator.settings.layout)
            if not self.generator.settings.residual:
                return weight
            return weight + (self.residual_out @ self.residual_in).view(self.weight_shape)

    def forward(self, input: Tensor) -> Tensor:
        """Convolve ``(n, in, h, w)`` with the generated weight."""
        return self._conv_forward(input, self.generate_weight(), self.bias)

    def _load_from_state_dict(self, state_dict: Mapping[str, Tensor], prefix: str, *args: Any) -> None:
        # Set by check_state_dict when the load began at the root, generators included.
        whole = self.__dict__.pop('_loading_whole', False)
        if f'{prefix}code' in state_dict and not whole:
            raise CSGError(
                f'{prefix}code: codes mean nothing without their generator, which lies at the root of the network; '
                'load the whole checkpoint into the whole network'
            )
        super()._load_from_state_dict(state_dict, prefix, *args)


class GeneratorBank(nn.ModuleList):
    """The generators of a model, its root's last child.

    Attributes:
        left_dense: name of each conv that stayed dense, and why.
    """

    def __init__(self, generators: Iterable[Generator], left_dense: Mapping[str, str]):
        super().__init__(generators)
        self.left_dense = dict(left_dense)

    def forward(self, input: Any) -> Any:
        """Return the input: a root that runs its children in turn, as ``nn.Sequential`` does, runs the bank too."""
        return input

    def __iter__(self) -> Iterator[Generator]:
        return cast(Iterator[Generator], super().__iter__())


def kaiming_std(weight_shape: Iterable[int]) -> float:
    """Return the std of He et al., ICCV 2015, for ReLU and the backward pass (fan out)."""
    out_channels, _, kh, kw = weight_shape
    return math.sqrt(2.0 / (out_channels * kh * kw))


def swap_in(conv: nn.Conv2d, generator: Generator, rng: torch.Generator) -> None:
    """Turn a dense conv into a generated one in place, at its Kaiming variance.

    Args:
        conv: a plain ``nn.Conv2d``.
        generator: still on the CPU, where start values are the same for all devices.
        rng: draws the codes; on the CPU too.
    """
    weight = conv.weight
    rows, cols = grid(weight.shape, generator.settings.slice_shape)
    code = generator.draw_code(rows * cols, weight_std=kaiming_std(weight.shape), rng=rng)
    conv.__class__ = CSGConv2d  # type: ignore[assignment]
    conv.register_parameter('weight', None)
    conv.code = nn.Parameter(code.to(weight), requires_grad=weight.requires_grad)
    # Past nn.Module's bookkeeping: registered here too, the generator would be
    # counted, saved and averaged once for each conv.
    object.__setattr__(conv, 'generator', generator)


def add_residual(conv: CSGConv2d, rng: torch.Generator) -> None:
    """Give a generated conv the residual that its generator's settings ask for.

    ``residual_out`` starts at zero, so the weight stays what it is; the rows of
    ``residual_in`` start at the generator's :func:`csg_seg.generator.row_length`, so
    that both learn at one pace.

    Args:
        conv: just swapped in.
        rng: draws ``residual_in``, on the CPU.
    """
    settings, weight_shape = conv.generator.settings, conv.weight_shape
    if settings.residual:
        fan_in = weight_shape[1:].numel()
        residual_in = torch.empty(settings.residual, fan_in, device='cpu')
        residual_in.normal_(mean=0.0, std=row_length(settings) / math.sqrt(fan_in), generator=rng)
        residual_out = torch.zeros(weight_shape[0], settings.residual, device='cpu')
        conv.residual_out = nn.Parameter(residual_out.to(conv.code), requires_grad=conv.code.requires_grad)
        conv.residual_in = nn.Parameter(residual_in.to(conv.code), requires_grad=conv.code.requires_grad)


def swap_out(conv: CSGConv2d) -> None:
    """Turn a generated conv into a plain dense one in place."""
    weight = conv.generate_weight().detach().clone(memory_format=torch.contiguous_format)
    conv.weight = nn.Parameter(weight, requires_grad=conv.code.requires_grad)
    for name in conv.stored():
        delattr(conv, name)
    object.__delattr__(conv, 'generator')
    conv.__class__ = nn.Conv2d  # type: ignore[assignment]


def generated_convs(model: nn.Module) -> Iterator[tuple[str, CSGConv2d]]:
    """Yield the name and the conv of each generated layer."""
    for name, module in model.named_modules():
        if isinstance(module, CSGConv2d):
            yield name, module


def find_bank(model: nn.Module) -> GeneratorBank | None:
    """Return the bank of a retrofitted root, None for any other module."""
    bank = model._modules.get(BANK)
    return bank if isinstance(bank, GeneratorBank) else None


def attach_bank(root: nn.Module, bank: GeneratorBank) -> None:
    """Register the bank on the root, and make loading into the root strict about it."""
    root.add_module(BANK, bank)
    root._register_load_state_dict_pre_hook(check_state_dict, with_module=True)


def find_roots(model: nn.Module) -> Iterator[tuple[str, nn.Module, GeneratorBank]]:
    """Yield each retrofitted root in a model, itself included: the prefix of its names, itself, its bank."""
    for name, module in model.named_modules():
        bank = find_bank(module)
        if bank is not None:
            yield f'{name}.' if name else '', module, bank


def detach_bank(root: nn.Module) -> None:
    """Undo :func:`attach_bank`."""
    root._modules.pop(BANK)
    hooks = root._load_state_dict_pre_hooks
    for key in [key for key, hook in hooks.items() if getattr(hook, 'hook', None) is check_state_dict]:
        del hooks[key]


def check_state_dict(root: nn.Module, state_dict: Mapping[str, Tensor], prefix: str, *_: object) -> None:
    """Refuse, before anything is copied, a state dict that does not fit the generated layers.

    Trainers load without ``strict`` and would keep random codes in silence.

    Raises:
        CSGError: codes or generators are missing or were made with other settings.
    """
    bank = find_bank(root)
    assert bank is not None
    for position, generator in enumerate(bank):
        state = state_dict.get(f'{prefix}{BANK}.{position}._extra_state')
        if state is not None:
            check_meaning(generator.settings, state)
    wanted = {f'{name}.{key}': tensor for name, conv in generated_convs(root) for key, tensor in conv.stored().items()}
    wanted |= {f'{BANK}.{name}': tensor for name, tensor in bank.state_dict().items()}
    missing = [name for name in wanted if prefix + name not in state_dict]
    if missing:
        raise CSGError(_describe_missing(missing, state_dict, prefix))
    for name, tensor in wanted.items():
        stored = state_dict[prefix + name].shape
        if stored != tensor.shape and not name.endswith('_extra_state'):
            raise CSGError(
                f'{name}: the checkpoint holds {tuple(stored)}, this model wants {tuple(tensor.shape)}; '
                "set the config's csg to the checkpoint's, or take another checkpoint"
            )
    for conv in dict(generated_convs(root)).values():
        conv.__dict__['_loading_whole'] = True


def _describe_missing(missing: list[str], state_dict: Mapping[str, Tensor], prefix: str) -> str:
    dense = [name for name in missing if prefix + name.removesuffix('code') + 'weight' in state_dict]
    has_generator = any(name.startswith(f'{prefix}{BANK}.') for name in state_dict)
    if dense and not has_generator:
        return (
            f'{dense[0].removesuffix(".code")} has no code in the checkpoint but a dense weight '
            f'({len(dense)} such layers); it is a dense checkpoint: use it with the dense config, '
            'or train this config to make one of its own'
        )
    return (
        f'the checkpoint lacks {missing[0]} ({len(missing)} such entries of generated layers); '
        'it was made from another network or with other settings: take a checkpoint of this config'
    )
