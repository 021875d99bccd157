"""Weights into a retrofitted network."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from csg_seg.errors import CSGError, abridge
from csg_seg.generators.settings import read_patterns
from csg_seg.layers.bank import BANK, find_bank
from csg_seg.layers.conv import named_convs


def fit(model: nn.Module, weights: Mapping[str, Tensor]) -> dict[str, float]:
    """Load trained dense weights into a retrofitted model, in place.

    Generators and codes become those that come nearest to the weights, everything
    else is copied. ``model.load_state_dict`` does the same; so do ``load_from`` and
    ``init_cfg`` of mmengine. The parameters stay the same objects, so that an
    optimizer may exist already; do it before ``DistributedDataParallel``, which
    gives all processes the same. A fit is where training starts: on its own it
    loses much of a network's accuracy.

    Args:
        model: a retrofitted network.
        weights: the state dict of its dense twin.

    Returns:
        the relative error of each generated weight, by layer name.

    Raises:
        CSGError: the model is not retrofitted, or the weights are not those of
            its dense twin.
    """
    bank = find_bank(model)
    if bank is None:
        raise CSGError('nothing to fit: the model is not retrofitted; call csg_seg.retrofit on it first')
    _check_weights('fit', weights)
    _check_has_values('fit', model)
    wanted = dense_shapes(model)
    given = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    wrong = [f'{name} is missing' for name in wanted if name not in given]
    wrong += [f'{name} {shape} is in excess' for name, shape in given.items() if name not in wanted]
    wrong += [
        f'{name} is {given[name]}, not {shape}' for name, shape in wanted.items() if given.get(name, shape) != shape
    ]
    if wrong:
        raise CSGError(f"the weights are not those of the model's dense twin: {abridge(wrong)}")
    model.load_state_dict(weights)
    return bank.fitted


def load_state_dict(
    model: nn.Module, weights: Mapping[str, Tensor], *, reset: str | Sequence[str] = ()
) -> tuple[str, ...]:
    """Load a checkpoint into a retrofitted model of which some layers may differ, in place.

    A layer that ``reset`` names and that the checkpoint does not fit, such as a classifier of other classes, keeps its
    start values; if it is generated, its codes are drawn for the generator that was loaded. All else is loaded
    strictly. In a config it is ``reset`` of ``CSGModel`` or ``CSGHook``.

    Args:
        model: a retrofitted network.
        weights: the state dict of a CSG network, or of the dense twin of one, to which the model is fitted.
        reset: patterns of layer names, as for ``include``.

    Returns:
        the names of the layers that kept their start values.

    Raises:
        CSGError: the model is not retrofitted, a pattern names no layer, or the weights do not fit elsewhere.
    """
    bank = find_bank(model)
    if bank is None:
        raise CSGError('the model is not retrofitted; call csg_seg.retrofit on it first, or model.load_state_dict')
    _check_weights('load_state_dict', weights)
    with bank.reset.allow(read_patterns('load_state_dict', 'reset', reset) or ()):
        try:
            model.load_state_dict(weights)
        except RuntimeError as error:  # torch's, of all entries that differ
            raise CSGError(f'the weights do not fit the model: {" ".join(str(error).split())[:300]}') from None
    return bank.reset.layers


def _check_has_values(who: str, model: nn.Module) -> None:
    """Refuse a model on the meta device, which holds no values to compute with."""
    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            raise CSGError(f'{who}: {name} is on the meta device and has no values; build the model on another device')


def _check_weights(who: str, weights: Any) -> None:
    """Refuse what is no state dict, such as a whole checkpoint or its path."""
    if not isinstance(weights, Mapping) or not all(isinstance(each, Tensor) for each in weights.values()):
        what = "its entry 'state_dict'" if isinstance(weights, Mapping) and 'state_dict' in weights else 'a state dict'
        raise CSGError(f'{who} wants the weights by name, not this {type(weights).__name__}; give {what}')


def load_generators(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Give a retrofitted model the generators of another one, in place, and draw all its codes anew for them.

    A later :func:`fit` keeps them and fits codes alone; training moves them, unless the
    model's settings have ``freeze_generator``.

    Args:
        model: a retrofitted network, of any architecture.
        weights: the state dict of a network with generators of the same settings.

    Raises:
        CSGError: the model is not retrofitted, or the generators are others than its own.
    """
    bank = find_bank(model)
    if bank is None:
        raise CSGError('there is no generator in the model; call csg_seg.retrofit on it first')
    _check_weights('load_generators', weights)
    _check_has_values('load_generators', model)
    bank.load_generators(weights)


def dense_shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Return the state-dict shapes of a retrofitted model's dense twin."""
    convs = named_convs(model)
    stored = {f'{name}.{key}' for name, conv in convs.items() for key in conv.stored()}
    shapes = {f'{name}.weight': tuple(conv.weight_shape) for name, conv in convs.items()}
    for name, tensor in model.state_dict().items():
        if name not in stored and not name.startswith(f'{BANK}.'):
            shapes[name] = tuple(tensor.shape)
    return shapes
