"""The generated convolution, and the bank of generators that feeds it."""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from .errors import CSGError, abridge
from .fit import fit_generator
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
        blend: a dense weight that takes part in training still, and the share of the generated one.
        loaded: a dense weight that was loaded and waits to be fitted.
    """

    code: nn.Parameter
    residual_out: nn.Parameter
    residual_in: nn.Parameter
    generator: Generator
    blend: tuple[Tensor, float] | None = None
    loaded: Tensor | None = None

    @property
    def weight_shape(self) -> torch.Size:
        """``(out, in, kh, kw)`` of the generated weight."""
        return torch.Size((self.out_channels, self.in_channels, *self.kernel_size))

    def stored(self) -> dict[str, nn.Parameter]:
        """Return, by name, the parameters that stand in for the weight."""
        names = ('code', 'residual_out', 'residual_in') if self.generator.settings.residual else ('code',)
        return {name: getattr(self, name) for name in names}

    def generate_weight(self) -> Tensor:
        """Return the weight ``(out, in, kh, kw)`` of the current code, generator and residual.

        Raises:
            CSGError: a dense weight was loaded into this part of the network and not fitted.
        """
        if self.loaded is not None:
            raise CSGError(
                'a dense weight was loaded into a part of the network and not fitted yet; load it into the whole '
                'network, or call model.csg.fit_loaded()'
            )
        # Half-precision generation nearly doubles the rounding error: let the conv cast instead.
        with torch.autocast(self.code.device.type, enabled=False):
            slices = self.generator(self.code)
            weight = join(slices, self.weight_shape, layout=self.generator.settings.layout)
            if not self.generator.settings.residual:
                return weight
            return weight + (self.residual_out @ self.residual_in).view(self.weight_shape)

    def forward(self, input: Tensor) -> Tensor:
        """Convolve ``(n, in, h, w)`` with the generated weight."""
        weight = self.generate_weight()
        if self.blend is not None and self.training:
            dense, share = self.blend
            weight = torch.lerp(dense, weight, share)
        return self._conv_forward(input, weight, self.bias)

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: Any) -> None:
        dense = state_dict.pop(f'{prefix}weight', None)
        if dense is not None:
            check_dense(prefix[:-1], self, dense)
            self.loaded = dense.detach()
            state_dict.update({f'{prefix}{key}': tensor.detach() for key, tensor in self.stored().items()})
        # Set by check_state_dict when the load began at the root, generators included: how often it comes here.
        visits = self.__dict__.pop('_visits', 0)
        if visits > 1:
            self.__dict__['_visits'] = visits - 1
        if dense is None and f'{prefix}code' in state_dict and not visits:
            raise CSGError(
                f'{prefix}code: codes mean nothing without their generator, which lies at the root of the network; '
                'load the whole checkpoint into the whole network'
            )
        super()._load_from_state_dict(state_dict, prefix, *args)


class GeneratorBank(nn.ModuleList):
    """The generators of a model, its root's last child.

    Attributes:
        left_dense: name of each conv that stayed dense, and why.
        fed: name and conv of each generated layer; the bank does not register them.
        after_fit: called with the bank once weights are fitted.
        fitted: the relative error of each layer's weight at the last fit, by name.
        fits: whether dense weights that are loaded are fitted, or dropped because a
            training checkpoint follows.
    """

    def __init__(self, generators: Iterable[Generator], left_dense: Mapping[str, str]):
        super().__init__(generators)
        self.left_dense = dict(left_dense)
        self.fed: dict[str, CSGConv2d] = {}
        self.after_fit: Callable[[GeneratorBank], None] | None = None
        self.fitted: dict[str, float] = {}
        self.fits = True

    def forward(self, input: Any) -> Any:
        """Return the input: a root that runs its children in turn, as ``nn.Sequential`` does, runs the bank too."""
        return input

    def __iter__(self) -> Iterator[Generator]:
        return cast(Iterator[Generator], super().__iter__())

    def init_weights(self) -> None:
        """Fit what was loaded into parts of the network; mmengine calls it last, after all other children's."""
        self.fit_loaded()

    def forget_loaded(self) -> None:
        """Drop dense weights that were loaded and not fitted."""
        for conv in self.fed.values():
            conv.loaded = None

    def fit_loaded(self) -> dict[str, float]:
        """Fit generators and codes to the dense weights that were loaded, in place.

        Layers without one get new codes if their generator changes.

        Returns:
            the relative error of each fitted layer's weight, by name.
        """
        if not self.fits:
            self.forget_loaded()
        waiting = {name: conv.loaded for name, conv in self.fed.items() if conv.loaded is not None}
        # First, so that none is left behind where a fit fails.
        self.forget_loaded()
        errors: dict[str, float] = {}
        for generator in self:
            fed = {name: conv for name, conv in self.fed.items() if conv.generator is generator}
            loaded = {name: waiting[name] for name in fed if name in waiting}
            if loaded:
                errors |= _fit(generator, fed, loaded)
        self.fitted = errors
        if errors and self.after_fit is not None:
            self.after_fit(self)
        return errors


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
    code = draw_code(weight.shape, generator, rng)
    conv.__class__ = CSGConv2d  # type: ignore[assignment]
    conv.register_parameter('weight', None)
    conv.code = nn.Parameter(code.to(weight), requires_grad=weight.requires_grad)
    # Past nn.Module's bookkeeping: registered here too, the generator would be
    # counted, saved and averaged once for each conv.
    object.__setattr__(conv, 'generator', generator)


def draw_code(weight_shape: Sequence[int], generator: Generator, rng: torch.Generator) -> Tensor:
    """Draw the codes ``(rows * cols, code_dim)`` of a weight at its Kaiming variance, on the CPU."""
    rows, cols = grid(weight_shape, generator.settings.slice_shape)
    return generator.draw_code(rows * cols, weight_std=kaiming_std(weight_shape), rng=rng)


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
    for name in ('blend', 'loaded'):
        conv.__dict__.pop(name, None)
    conv.__class__ = nn.Conv2d  # type: ignore[assignment]


def generated_convs(model: nn.Module) -> Iterator[tuple[str, CSGConv2d]]:
    """Yield the name and the conv of each generated layer."""
    for name, module in model.named_modules():
        if isinstance(module, CSGConv2d):
            yield name, module


def named_convs(model: nn.Module) -> dict[str, CSGConv2d]:
    """Return each generated layer by all its names: one that stands in two places has two in a state dict."""
    modules = model.named_modules(remove_duplicate=False)
    return {name: module for name, module in modules if isinstance(module, CSGConv2d)}


def find_bank(model: nn.Module) -> GeneratorBank | None:
    """Return the bank of a retrofitted root, None for any other module."""
    bank = model._modules.get(BANK)
    return bank if isinstance(bank, GeneratorBank) else None


def attach_bank(root: nn.Module, bank: GeneratorBank) -> None:
    """Register the bank on the root, and make loading into the root strict about it."""
    bank.fed = dict(generated_convs(root))
    root.add_module(BANK, bank)
    root._register_load_state_dict_pre_hook(check_state_dict, with_module=True)
    root.register_load_state_dict_post_hook(fit_after_load)


def find_roots(model: nn.Module) -> Iterator[tuple[str, nn.Module, GeneratorBank]]:
    """Yield each retrofitted root in a model, itself included: the prefix of its names, itself, its bank."""
    for name, module in model.named_modules():
        bank = find_bank(module)
        if bank is not None:
            yield f'{name}.' if name else '', module, bank


def detach_bank(root: nn.Module) -> None:
    """Undo :func:`attach_bank`."""
    root._modules.pop(BANK)
    for hooks, ours in (
        (root._load_state_dict_pre_hooks, check_state_dict),
        (root._load_state_dict_post_hooks, fit_after_load),
    ):
        for key in [key for key, hook in hooks.items() if getattr(hook, 'hook', hook) is ours]:
            del hooks[key]


def fit_after_load(root: nn.Module, incompatible_keys: Any) -> None:
    """Fit what a dense state dict has just brought into the root."""
    bank = find_bank(root)
    assert bank is not None
    bank.fit_loaded()


def check_state_dict(root: nn.Module, state_dict: dict[str, Tensor], prefix: str, *_: object) -> None:
    """Refuse, before anything is copied, a state dict that does not fit the generated layers.

    Trainers load without ``strict`` and would keep random codes in silence. A dense
    state dict is completed by the generators as they are, which are fitted to it afterwards.

    Raises:
        CSGError: codes or generators are missing or were made with other settings,
            or a dense state dict is another network's.
    """
    bank = find_bank(root)
    assert bank is not None
    bank.forget_loaded()
    convs = named_convs(root)
    stored_bank = {f'{prefix}{BANK}.{name}': tensor for name, tensor in bank.state_dict().items()}
    if _is_dense(state_dict, prefix, convs) and not stored_bank.keys() & state_dict.keys():
        _check_dense_network(root, state_dict, prefix)
        state_dict.update(stored_bank)
        return
    for position, generator in enumerate(bank):
        state = state_dict.get(f'{prefix}{BANK}.{position}._extra_state')
        if state is not None:
            check_meaning(generator.settings, state)
    wanted: dict[str, Tensor] = dict(stored_bank)
    for name, conv in convs.items():
        wanted |= {f'{prefix}{name}.{key}': tensor for key, tensor in conv.stored().items()}
    missing = [name for name in wanted if name not in state_dict]
    if missing:
        raise CSGError(
            f'the checkpoint lacks {missing[0]} ({len(missing)} such entries of generated layers); '
            'it was made from another network or with other settings: take a checkpoint of this config'
        )
    for name, tensor in wanted.items():
        stored = state_dict[name].shape
        if stored != tensor.shape and not name.endswith('_extra_state'):
            raise CSGError(
                f'{name}: the checkpoint holds {tuple(stored)}, this model wants {tuple(tensor.shape)}; '
                "set the config's csg to the checkpoint's, or take another checkpoint"
            )
    for conv, visits in Counter(convs.values()).items():
        conv.__dict__['_visits'] = visits


def check_dense(name: str, conv: CSGConv2d, weight: Tensor) -> None:
    """Refuse a dense weight that no generator can be fitted to.

    Raises:
        CSGError: its shape is not the conv's, or it is not finite.
    """
    if weight.shape != conv.weight_shape:
        raise CSGError(
            f'{name}.weight is {tuple(weight.shape)} in the checkpoint and {tuple(conv.weight_shape)} in the model; '
            'take a dense checkpoint of the same network'
        )
    check_finite(f'{name}.weight', weight)


def check_finite(name: str, tensor: Tensor) -> None:
    """Refuse NaN and infinity in trained weights or statistics.

    Raises:
        CSGError: there is one.
    """
    if not torch.isfinite(tensor).all():
        raise CSGError(f'{name} holds NaN or infinite values; take a checkpoint from before training diverged')


def _is_dense(state_dict: Mapping[str, Tensor], prefix: str, convs: Iterable[str]) -> bool:
    return any(f'{prefix}{name}.weight' in state_dict for name in convs) and not any(
        f'{prefix}{name}.code' in state_dict for name in convs
    )


def _check_dense_network(root: nn.Module, state_dict: Mapping[str, Tensor], prefix: str) -> None:
    """Refuse another network's weights; a part that only one of the two has, such as a head, may differ."""
    convs = named_convs(root)
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


def _fit(generator: Generator, fed: Mapping[str, CSGConv2d], loaded: Mapping[str, Tensor]) -> dict[str, float]:
    """Fit one generator, and the convs it feeds, to dense weights of some of them."""
    codes = dict(zip(loaded, fit_generator(generator, list(loaded.values())), strict=True))
    rng = torch.Generator().manual_seed(generator.settings.seed)
    errors = {}
    for name, conv in fed.items():
        if name not in loaded and generator.settings.freeze_generator:
            continue
        code = codes[name] if name in codes else draw_code(conv.weight_shape, generator, rng)
        with torch.no_grad():
            conv.code.copy_(code)
            if name in loaded:
                dense = loaded[name].to(conv.code)
                _fit_residual(conv, dense)
                norm = dense.norm().item()
                errors[name] = (conv.generate_weight() - dense).norm().item() / norm if norm else 0.0
    return errors


def _fit_residual(conv: CSGConv2d, dense: Tensor) -> None:
    """Set a conv's residual, if it has one, to the best of its rank: a truncated SVD of what the generator leaves."""
    rank = conv.generator.settings.residual
    if rank:
        conv.residual_out.zero_()
        left = (dense - conv.generate_weight()).flatten(1)
        out, scale, into = torch.linalg.svd(left, full_matrices=False)
        # Shared alike between the factors, so that both learn at one pace.
        conv.residual_out.copy_(out[:, :rank] * scale[:rank].sqrt())
        conv.residual_in.copy_(scale[:rank, None].sqrt() * into[:rank])
