"""Load weights into a retrofitted network."""

import copy
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from csg_seg.errors import CSGError, abridge
from csg_seg.generators.linear import Generator
from csg_seg.generators.settings import read_patterns
from csg_seg.layers.bank import BANK, GeneratorBank, bank_of, check_module, find_bank, other_network, same_generators
from csg_seg.layers.conv import check_codes, generated_convs
from csg_seg.layers.root import SHARING
from csg_seg.layers.state_dict_checks import describe_names


def fit(model: nn.Module, weights: Mapping[str, Tensor]) -> dict[str, float]:
    """Fit a retrofitted model to trained dense weights, in place.

    Generators and codes become those that approximate the weights best; all other entries are copied.
    ``model.load_state_dict`` and mmengine's ``load_from`` and ``init_cfg`` do the same. The parameters stay the same
    objects, so an optimizer may already exist. Call it before wrapping the model in ``DistributedDataParallel``, which
    then copies the result to all processes. A fit is where training starts: on its own it loses much of the accuracy.

    Args:
        model: a retrofitted network.
        weights: the state dict of the dense network.

    Returns:
        The relative error of each generated weight, by layer name.

    Raises:
        CSGError: the model is not retrofitted, or the weights are not those of the dense network.
    """
    bank = _check('fit', model, weights)
    _check_has_values('fit', model)
    for name, conv in generated_convs(model):
        check_codes(name, conv)
    wanted = dense_shapes(model)
    given = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    wrong = [f'{name} is missing' for name in wanted if name not in given]
    wrong += [f'{name} {shape} is unexpected' for name, shape in given.items() if name not in wanted]
    wrong += [
        f'{name} is {given[name]}, not {shape}' for name, shape in wanted.items() if given.get(name, shape) != shape
    ]
    if wrong:
        if any(name.startswith(f'{BANK}.') for name in given):
            said = 'these have codes; load them with load_state_dict'
        elif not wanted.keys() & given.keys():
            said = f'{abridge(wrong)}; {describe_names(weights)}'
        else:
            said = (
                f'{abridge(wrong)}; to let layers start anew, such as a new head, use '
                'csg_seg.load_state_dict(model, weights, reset=[...])'
            )
        raise CSGError(f'the weights are not those of the dense network: {said}')
    model.load_state_dict(weights)
    return bank.loading.errors


def load_state_dict(
    model: nn.Module, weights: Mapping[str, Tensor], *, reset: str | Sequence[str] = ()
) -> tuple[str, ...]:
    """Load a checkpoint into a retrofitted model, in place; some layers may differ. If it is refused, nothing changes.

    A layer that matches ``reset`` and does not fit the checkpoint, such as a classifier for other classes, keeps its
    start values; if it is generated, its codes are drawn for the generator that was loaded. Everything else is loaded
    strictly. In a config, set ``reset`` of ``CSGModel`` or ``CSGHook`` instead.

    Args:
        model: a retrofitted network.
        weights: the state dict of a CSG network, or of a dense network, to which the model is fitted.
        reset: patterns of layer names, as in ``include``.

    Returns:
        The names of the layers that kept their start values.

    Raises:
        CSGError: the model is not retrofitted, a pattern matches no layer, or the weights do not fit elsewhere.
    """
    bank = _check('load_state_dict', model, weights)
    with bank.reset.allow(read_patterns('load_state_dict', 'reset', reset) or ()):
        if not _has_shapes_of(model, bank, weights):
            # torch copies what fits before it refuses the rest, and modules may adapt what they load: let a copy try.
            trial = copy.deepcopy(model)
            bank_of(trial).loading.fit_on_load = False  # which takes long, and refuses nothing
            _load_strictly(trial, weights)
        _load_strictly(model, weights)
    return bank.reset.layers


def _has_shapes_of(model: nn.Module, bank: GeneratorBank, weights: Mapping[str, Tensor]) -> bool:
    """Whether the weights have the names and shapes of the model, retrofitted or dense."""
    if any(conv.loaded is not None for conv in bank.layers.values()):  # its state dict cannot be taken
        return False
    given = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    return given in ({name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}, dense_shapes(model))


def _load_strictly(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:  # torch lists every entry that differs
        raise CSGError(f'the weights do not fit the model: {" ".join(str(error).split())[:300]}') from None


def load_generators(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Copy the generators of another network into a retrofitted model, in place, and draw new codes for them.

    A later :func:`fit` keeps these generators and fits only codes; training changes them, unless the model's settings
    have ``freeze_generator``.

    Args:
        model: a retrofitted network of any architecture.
        weights: the state dict of a network whose generators have the same settings.

    Raises:
        CSGError: the model is not retrofitted, or its generators have other settings.
    """
    bank = _check('load_generators', model, weights)
    _check_has_values('load_generators', model)
    bank.loading.load_generators(weights)


def share_generators(model: nn.Module, *others: nn.Module) -> None:
    """Let networks hold their equal generators once, in place, to serve many of them from one process.

    The networks may have any architectures. A network that loads other weights, moves or is cast takes generators of
    its own again. Training one of them would change the generators of all.

    Args:
        model: a retrofitted network, whose generators stay.
        others: retrofitted networks with the same generators, such as updates of one compact checkpoint.

    Raises:
        CSGError: a network is not retrofitted, or a generator differs; then nothing is changed.
    """
    bank = _check('share_generators', model, {})
    banks = [_check('share_generators', each, {}) for each in others]
    for position, other in enumerate(banks, start=1):
        if len(other) != len(bank) or not all(map(_interchangeable, bank, other)):
            raise CSGError(
                f'share_generators: network {position} of the others has other generators than the first, or in '
                'another dtype or on another device; share those that come from one base, in its precision, and were '
                'trained without changing the generator'
            )
    for other in banks:
        other.take_generators(bank)
    SHARING.update([bank, *banks])


def _interchangeable(one: Generator, other: Generator) -> bool:
    tensors = (one.state_dict().values(), other.state_dict().values())
    alike = all(a.dtype == b.dtype and a.device == b.device for a, b in zip(*tensors, strict=False))
    return alike and same_generators(one, other)


def dense_shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Return the state-dict shapes of the dense network that a retrofitted model was made from."""
    convs = dict(generated_convs(model, remove_duplicate=False))
    stored = {f'{name}.{key}' for name, conv in convs.items() for key in conv.stored()}
    shapes = {f'{name}.weight': tuple(conv.weight_shape) for name, conv in convs.items()}
    for name, tensor in model.state_dict().items():
        if name not in stored and not name.startswith(f'{BANK}.'):
            shapes[name] = tuple(tensor.shape)
    return shapes


def _check(caller: str, model: nn.Module, weights: Any) -> GeneratorBank:
    """Refuse a dense model, and weights that are not a state dict, such as a whole checkpoint or its path."""
    check_module(model, f'{caller}: the network')
    bank = find_bank(model)
    if bank is None:
        said = other_network(model) or 'the model is not retrofitted; call csg_seg.retrofit on it first'
        raise CSGError(f'{caller}: {said}')
    if not isinstance(weights, Mapping) or not all(
        isinstance(name, str) and isinstance(each, Tensor) for name, each in weights.items()
    ):
        entries = weights.items() if isinstance(weights, Mapping) else ()
        nested = [key for key, each in entries if isinstance(each, Mapping) and 'param_groups' not in each]
        wanted = f'its entry {nested[0]!r}' if nested else 'a state dict'
        raise CSGError(f'{caller} needs a dict of tensors by name, not this {type(weights).__name__}; give {wanted}')
    return bank


def _check_has_values(caller: str, model: nn.Module) -> None:
    """Refuse a model on the meta device, which has no values to compute with."""
    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            raise CSGError(f'{caller}: {name} is on the meta device and has no values; build it elsewhere')
