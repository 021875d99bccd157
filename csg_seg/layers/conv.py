"""The generated convolution."""

import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.fx import Proxy
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils.parametrize import is_parametrized
from torch.nn.utils.prune import is_pruned

from csg_seg.errors import CSGError, CSGWarning
from csg_seg.generators.lengths import row_length
from csg_seg.generators.linear import Generator, new_rng
from csg_seg.generators.products import is_recorded, multiply
from csg_seg.generators.slices import grid, in_memory_order, join

BANK = 'csg'  # the name of the generators, on the root
DENSE_KINDS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
# Layers with more weight values than this are made in parts; for smaller ones, memory does not matter.
LARGE = 2**20
NO_WEIGHT = (
    'the weight of a generated conv is made from its code; call csg_seg.materialise(model) before you set or prune it'
)
SAVED_ALONE = (
    'this state dict is of a part of a generated network: it has codes without their generator, and cannot be loaded. '
    'Save the whole network; for the part alone, take the state dict from csg_seg.materialise(copy.deepcopy(model))'
)
COMPUTED = (
    'has a parameter that is pruned or parametrised; call prune.remove or parametrize.remove_parametrizations first'
)
# An entry that a load of the whole root adds for each conv, to tell it from a load into a part.
FROM_ROOT = '_loaded_from_root'


class CSGConv(_ConvNd):
    """A conv whose weight is generated from codes each time it is read.

    :func:`swap_in` turns any conv of torch, or of a subclass, into one in place. Names, hooks, stride, padding,
    dilation, groups, bias and the class's own forward stay the same. Modules that compute with ``conv.weight``
    themselves work too. The weight cannot be assigned; in-place writes to it, as by an initialiser, have no effect.

    Attributes:
        code: ``(rows * cols, code_dim)``, one code for each slice of the grid.
        residual_out: ``(weight's first dimension, residual)``, only if the settings ask for a residual.
        residual_in: ``(residual, all other dimensions)``, only if the settings ask for a residual.
        generator: shared by many convs and registered on the model's root alone.
        loaded: a dense weight that was loaded and not fitted yet.
        ready: returns a weight made ahead, or None if it is out of date; see :mod:`csg_seg.layers.ahead`.
        channels_last: whether the weight's memory is in channels-last order, as a dense weight's would be.
        dense_kind: the class that the conv had.
        changes: how many generated convs have been copied, unpickled or materialised in this process.
    """

    changes: ClassVar[int] = 0
    code: nn.Parameter
    residual_out: nn.Parameter
    residual_in: nn.Parameter
    generator: Generator
    loaded: Tensor | None = None
    ready: Callable[[], Tensor | None] | None = None
    channels_last: bool = False
    dense_kind: type[_ConvNd]

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        """Make a dense conv, for code that asks a generated one for its class."""
        return cls.dense_kind(*args, **kwargs)

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Skip the dense class's own ``__init_subclass__``, which may register subclasses."""

    @property
    def weight_shape(self) -> torch.Size:
        """``(out, in / groups, *kernel)`` of the generated weight, ``(in, out / groups, *kernel)`` if transposed."""
        return shape_of_weight(self)

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The weight that the conv computes with."""
        ready = self.ready  # read once: a pass that ends in another thread removes it
        weight = None if ready is None else ready()
        return self.generate_weight() if weight is None else weight

    def __setattr__(self, name: str, value: Any) -> None:
        """Refuse a new weight: the next forward pass would not use it.

        Raises:
            CSGError: says what to do.
        """
        if name == 'weight':
            raise CSGError(NO_WEIGHT)
        super().__setattr__(name, value)

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """Refuse a weight under another name, as torch's pruning registers it.

        Raises:
            CSGError: says what to do.
        """
        if name == 'weight_orig':
            raise CSGError(NO_WEIGHT)
        super().register_parameter(name, param)

    def reset_parameters(self) -> None:
        """Draw new start values, in place, as torch's convs do; at the variance that retrofit gives them."""
        check_codes('the layer', self)
        rng = new_rng()
        with torch.no_grad():
            self.code.copy_(draw_code(self, rng))
            if self.generator.settings.residual:
                self.residual_out.zero_()
                self.residual_in.copy_(draw_residual(self, rng))
            if self.bias is not None:
                bound = 1 / math.sqrt(self.weight_shape[1:].numel())
                self.bias.uniform_(-bound, bound)

    def stored(self) -> dict[str, nn.Parameter]:
        """Return, by name, the parameters that are stored instead of the weight."""
        names = ('code', 'residual_out', 'residual_in') if self.generator.settings.residual else ('code',)
        return {name: getattr(self, name) for name in names}

    def generate_weight(self) -> Tensor:
        """Return the weight of the current code, generator and residual.

        Without gradients, a large weight is made one row of its grid at a time, so that memory holds little more.
        """
        if isinstance(self.code, Proxy):
            raise CSGError('torch.fx cannot trace generated weights; call csg_seg.materialise(model) before')
        is_large = type(self.code) is nn.Parameter and self.weight_shape.numel() > LARGE
        if is_large and not (torch.is_grad_enabled() or is_recorded()):
            return self._generate_by_rows()
        return generate_weights([self])[0]

    def _generate_by_rows(self) -> Tensor:
        check_fitted([self])
        settings, (out_channels, *rest) = self.generator.settings, self.weight_shape
        rows, cols = grid(self.weight_shape, settings.slice_shape)
        weight: Tensor | None = None
        with precision_of(self.generator, self.code.device.type):
            for row, code in enumerate(self.code.detach().view(rows, cols, -1)):
                start = row * settings.slice_shape[0]
                stop = min(start + settings.slice_shape[0], out_channels)
                (slices,) = self.generator.generate([code])
                part = join(slices, (stop - start, *rest), layout=settings.layout)
                if settings.residual:
                    part = part + (self.residual_out[start:stop] @ self.residual_in).view_as(part)
                if weight is None:
                    empty = part.new_empty(self.weight_shape)
                    weight = in_memory_order(empty, channels_last=self.channels_last)
                weight[start:stop] = part
        assert weight is not None
        return weight

    def _assemble(self, slices: Tensor) -> Tensor:
        layout = self.generator.settings.layout
        weight = join(slices, self.weight_shape, layout=layout, channels_last=self.channels_last)
        if not self.generator.settings.residual:
            return weight
        return weight + multiply(self.residual_in, [self.residual_out])[0].view(self.weight_shape)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Move or cast the codes, and find out which memory format a dense weight would have afterwards."""
        weight = torch.empty([2] * len(self.weight_shape), dtype=self.code.dtype, device=self.code.device)
        weight = in_memory_order(weight, channels_last=self.channels_last)
        self.channels_last = not fn(weight).is_contiguous()
        return super()._apply(fn, recurse)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        """Warn if the generators, which the root saves first, are missing."""
        parts = prefix.split('.')
        roots = ('.'.join([*parts[:depth], BANK]) for depth in range(len(parts)))
        is_alone = not any(f'{root}.0._extra_state' in destination for root in roots)
        if is_alone and not any(name.rpartition('.')[2] == 'code' for name in destination):
            warnings.warn(SAVED_ALONE, CSGWarning, stacklevel=2)
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: Any) -> None:
        dense = state_dict.pop(f'{prefix}weight', None)
        if dense is not None:
            check_dense(prefix[:-1], self, dense)
            state_dict.update({f'{prefix}{key}': tensor.detach() for key, tensor in self.stored().items()})
            # ConvAWS2d computes statistics of the weight while it loads.
            self.__dict__['ready'] = dense.detach
        is_from_root = state_dict.pop(f'{prefix}{FROM_ROOT}', None) is not None
        if dense is None and f'{prefix}code' in state_dict and not is_from_root:
            raise CSGError(
                f'{prefix}code: codes mean nothing without their generator, which is stored at the root of the '
                'network; load the whole checkpoint into the whole network'
            )
        try:
            with torch.no_grad():
                super()._load_from_state_dict(state_dict, prefix, *args)
        finally:
            self.__dict__.pop('ready', None)
        if dense is not None:
            self.loaded = dense.detach()

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        """Pickle and copy by the dense class, because the generated class is created at run time."""
        state = super().__reduce_ex__(protocol)[2]  # of the class's own __getstate__, if it has one
        if isinstance(state, dict):
            state = {key: each for key, each in state.items() if key != 'ready'}
        return _blank, (self.dense_kind,), state


# Attributes of generated convs that a dense conv must not have.
RESERVED = {name for name in (*CSGConv.__annotations__, *vars(CSGConv)) if not name.startswith('__')}
RESERVED -= {*dir(_ConvNd), 'weight'}


def shape_of_weight(conv: _ConvNd) -> torch.Size:
    """Return the shape of a conv's weight according to its channels and kernel."""
    first, second = conv.out_channels, conv.in_channels
    if conv.transposed:
        first, second = second, first
    return torch.Size((first, second // conv.groups, *conv.kernel_size))


def generate_weights(convs: Sequence[CSGConv]) -> list[Tensor]:
    """Return the weights of convs of one generator, by one product, after :func:`check_fitted`."""
    check_fitted(convs)
    generator = convs[0].generator
    with precision_of(generator, convs[0].code.device.type):
        slices = generator.generate([conv.code for conv in convs])
        return [conv._assemble(each) for conv, each in zip(convs, slices, strict=True)]


def precision_of(generator: Generator, device: str) -> AbstractContextManager:
    """Return the context in which weights are generated: without autocast, unless the settings follow it."""
    follows = autocast_dtype(generator, device) is not None
    return nullcontext() if follows else torch.autocast(device, enabled=False)


def autocast_dtype(generator: Generator, device: str) -> torch.dtype | None:
    """Return the dtype in which autocast generates weights here, None if it has no effect on them."""
    if generator.settings.precision == 'autocast' and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return None


def check_fitted(convs: Iterable[CSGConv]) -> None:
    """Refuse convs with a dense weight that is not fitted yet.

    Raises:
        CSGError: a dense weight was loaded into a part of the network and not fitted.
    """
    if any(conv.loaded is not None for conv in convs):
        raise CSGError(
            'a dense weight was loaded into a part of the network and not fitted yet; load it into the whole '
            'network, or call model.csg.fit_loaded()'
        )


def check_plain(convs: Mapping[str, CSGConv]) -> None:
    """Refuse codes and generators that are computed from other parameters, as pruning and parametrisation do.

    A compact file would not hold these parameters, and a plain conv would keep them.

    Args:
        convs: by name.

    Raises:
        CSGError: says what to do.
    """
    for name, conv in convs.items():
        generator = conv.generator
        if any(hasattr(each, 'device_mesh') for each in (*conv.parameters(), *generator.parameters())):
            raise CSGError(f'{name} is sharded; load a full state dict into a network that is not')
        check_codes(name, conv)
        if is_parametrized(conv):
            raise CSGError(f'{name} {COMPUTED}')
        is_changed = is_parametrized(generator) or is_pruned(generator)
        if is_changed or 'weight' not in {*generator._parameters, *generator._buffers}:
            raise CSGError(f'the generator of {name} {COMPUTED}')


def check_codes(name: str, conv: CSGConv) -> None:
    """Refuse a conv whose codes are computed from other parameters.

    Raises:
        CSGError: says what to do.
    """
    if not conv.stored().keys() <= {*conv._parameters, *conv._buffers}:
        raise CSGError(f'{name} {COMPUTED}')


_generated_kinds: dict[type, type[CSGConv]] = {}


def generated_kind(kind: type) -> type[CSGConv]:
    """Return the class of generated convs that behave as the given dense class otherwise."""
    if kind not in _generated_kinds:
        name, body = f'CSG{kind.__name__}', {'dense_kind': kind, '__doc__': CSGConv.__doc__}
        _generated_kinds[kind] = type(name, (CSGConv, kind), body)
    return _generated_kinds[kind]


def _blank(kind: type[_ConvNd]) -> CSGConv:
    CSGConv.changes += 1
    return object.__new__(generated_kind(kind))


def kaiming_std(conv: _ConvNd) -> float:
    """Return the std of He et al., ICCV 2015, for ReLU and the backward pass (fan out)."""
    return math.sqrt(2.0 * conv.groups / (conv.out_channels * math.prod(conv.kernel_size)))


def swap_in(conv: _ConvNd, generator: Generator, rng: torch.Generator) -> None:
    """Turn a dense conv into a generated one in place, at its Kaiming variance.

    Args:
        conv: one of :data:`DENSE_KINDS`, or of a subclass.
        generator: still on the CPU, where start values are the same for all devices.
        rng: draws the codes; on the CPU too.
    """
    weight = conv._parameters.pop('weight')
    assert weight is not None
    conv.__class__ = generated_kind(type(conv))  # type: ignore[assignment]
    generated = cast(CSGConv, conv)
    # Past nn.Module's bookkeeping: registered here too, the generator would be
    # counted, saved and averaged once for each conv.
    object.__setattr__(generated, 'generator', generator)
    generated.channels_last = not weight.is_contiguous() and weight.movedim(1, -1).is_contiguous()
    code = draw_code(generated, rng)
    generated.code = nn.Parameter(code.to(weight), requires_grad=weight.requires_grad)
    vars(generated.code).update(vars(weight))  # such as a factor of the learning rate


def draw_code(conv: CSGConv, rng: torch.Generator) -> Tensor:
    """Draw the codes ``(rows * cols, code_dim)`` of a conv at its Kaiming variance, on the CPU."""
    rows, cols = grid(conv.weight_shape, conv.generator.settings.slice_shape)
    return conv.generator.draw_code(rows * cols, weight_std=kaiming_std(conv), rng=rng)


def draw_residual(conv: CSGConv, rng: torch.Generator) -> Tensor:
    """Draw ``residual_in`` of a conv, on the CPU; its rows have the length of the generator's."""
    settings, fan_in = conv.generator.settings, conv.weight_shape[1:].numel()
    residual_in = torch.empty(settings.residual, fan_in, device='cpu')
    return residual_in.normal_(mean=0.0, std=row_length(settings) / math.sqrt(fan_in), generator=rng)


def add_residual(conv: CSGConv, rng: torch.Generator) -> None:
    """Give a generated conv the residual that its generator's settings ask for.

    ``residual_out`` starts at zero, so the weight stays what it is; the rows of
    ``residual_in`` start at the generator's :func:`csg_seg.generators.lengths.row_length`,
    so that both learn at the same pace.

    Args:
        conv: just swapped in.
        rng: draws ``residual_in``, on the CPU.
    """
    settings, weight_shape = conv.generator.settings, conv.weight_shape
    if settings.residual:
        residual_in = draw_residual(conv, rng)
        residual_out = torch.zeros(weight_shape[0], settings.residual, device='cpu')
        conv.residual_out = nn.Parameter(residual_out.to(conv.code), requires_grad=conv.code.requires_grad)
        conv.residual_in = nn.Parameter(residual_in.to(conv.code), requires_grad=conv.code.requires_grad)


def swap_out(conv: CSGConv, weight: Tensor) -> None:
    """Turn a generated conv into a plain dense one in place.

    Args:
        weight: the weight to keep.
    """
    weight = in_memory_order(weight.detach().clone(), channels_last=conv.channels_last)
    dense = nn.Parameter(weight, requires_grad=conv.code.requires_grad)
    vars(dense).update(vars(conv.code))
    for name in conv.stored():
        delattr(conv, name)
    object.__delattr__(conv, 'generator')
    for name in ('loaded', 'ready', 'channels_last'):
        conv.__dict__.pop(name, None)
    conv.__class__ = conv.dense_kind  # type: ignore[assignment]
    CSGConv.changes += 1
    # The weight comes first, as in a conv that was never generated.
    others = dict(conv._parameters)
    conv._parameters.clear()
    conv._parameters.update({'weight': dense, **others})


def find_convs(model: nn.Module, *, remove_duplicate: bool = True) -> dict[str, _ConvNd]:
    """Return torch's convs and their subclasses, dense and generated, by name; by all names if duplicates are kept."""
    modules = model.named_modules(remove_duplicate=remove_duplicate)
    return {name: module for name, module in modules if isinstance(module, DENSE_KINDS)}


def find_others(model: nn.Module) -> dict[str, nn.Module]:
    """Return, by name, modules with a conv's weight that are not convs of torch, such as deformable convs."""
    return {
        name: module
        for name, module in model.named_modules()
        if not isinstance(module, (*DENSE_KINDS, Generator))
        and (weight := module._parameters.get('weight')) is not None
        and weight.dim() >= 4
    }


def generated_convs(model: nn.Module, *, remove_duplicate: bool = True) -> Iterator[tuple[str, CSGConv]]:
    """Yield the name and the conv of each generated layer.

    If duplicates are kept, a layer has all its names: one that is registered twice has two in a state dict.
    """
    for name, module in model.named_modules(remove_duplicate=remove_duplicate):
        if isinstance(module, CSGConv):
            yield name, module


def check_dense(name: str, conv: CSGConv, weight: Tensor) -> None:
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
    """Refuse NaN and infinity in trained weights or statistics, but not a running variance of +inf.

    A running variance overflows to +inf in half precision. Batch norm divides by its root, so in evaluation the
    channel equals its bias; training uses the batch's own variance.

    Raises:
        CSGError: the tensor holds such a value.
    """
    accepted = torch.isfinite(tensor)
    if name.endswith('running_var'):
        accepted |= torch.isposinf(tensor)
    if not accepted.all():
        raise CSGError(f'{name} holds NaN or infinite values; take a checkpoint from before training diverged')
