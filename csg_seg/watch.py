"""Say once, in the first steps of a training, where generators do not train as the optimizer's settings suggest.

A generated weight moves with its layer's code and with the generator. A layer that is frozen, or has a rate of its own,
still moves with a generator that trains for other layers; a generator that no optimizer holds stays as it is. Both
happen in silence: parameter groups are made by layer, and a generator belongs to many.
"""

import gc
import warnings
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook

from .conv import CSGConv
from .errors import CSGWarning, abridge
from .generator import Generator

# Steps of any optimizer after which a network that has had no gradient is watched no more.
STEPS = 20


class Rate(NamedTuple):
    """How an optimizer moves a parameter."""

    lr: float
    weight_decay: float


NOT_HELD = Rate(0.0, 0.0)


class _Watch:
    """The layers that are watched, while there are any; one for a process, as torch's hook of all optimizers is."""

    def __init__(self) -> None:
        self.layers: WeakKeyDictionary[CSGConv, str] = WeakKeyDictionary()
        self.steps_left = 0
        self.hook: Any = None

    def begin(self, layers: Mapping[str, CSGConv]) -> None:
        self.layers.update({conv: name for name, conv in layers.items()})
        self.steps_left = STEPS
        if self.hook is None:
            self.hook = register_optimizer_step_post_hook(self.look)

    def look(self, optimizer: Optimizer, *_: Any) -> None:
        """Look, after a step, at the generators that had a gradient in it."""
        by_generator: dict[Generator, dict[str, CSGConv]] = defaultdict(dict)
        for conv, name in self.layers.items():
            if isinstance(conv, CSGConv):  # it may have been materialised since
                by_generator[conv.generator][name] = conv
        for generator, layers in by_generator.items():
            found = examine(generator, layers, optimizer)
            if found:
                warnings.warn(found, CSGWarning, stacklevel=3)  # where the user's program calls step()
            if found is not None:
                for conv in layers.values():
                    self.layers.pop(conv, None)
        self.steps_left -= 1
        if not self.layers or self.steps_left <= 0:
            self.layers.clear()
            self.hook.remove()
            self.hook = None


_watch = _Watch()


def begin(layers: Mapping[str, CSGConv]) -> None:
    """Watch generated layers, by name, until their generator has had its first step."""
    _watch.begin(layers)


def examine(generator: Generator, layers: Mapping[str, CSGConv], optimizer: Optimizer) -> str | None:
    """Describe the layers that move otherwise than the optimizer's settings suggest.

    Args:
        generator: of these layers.
        layers: by name.
        optimizer: has just made a step.

    Returns:
        a warning, empty if there is nothing to tell; None if the step was none of this generator's, or one whose
        rates were all zero.
    """
    learning = [each for each in generator.parameters() if each.requires_grad and each.grad is not None]
    codes = {name: conv.code for name, conv in layers.items()}
    rates = _rates([optimizer])
    if not learning or not any(id(each) in rates for each in (*learning, *codes.values())):
        return None
    if not all(id(each) in rates for each in (*learning, *(code for code in codes.values() if code.requires_grad))):
        # Other optimizers may hold the rest.
        rates = _rates(each for each in gc.get_objects() if issubclass(type(each), Optimizer))
    of_generator = max((rates.get(id(each), NOT_HELD) for each in learning), key=lambda rate: rate.lr)
    if of_generator.lr > 0:
        return _describe_layers(codes, rates, of_generator)
    moving = [name for name, code in codes.items() if code.requires_grad and rates.get(id(code), NOT_HELD).lr > 0]
    if not moving:
        return None
    why = 'no optimizer holds it' if of_generator is NOT_HELD else 'its learning rate is 0'
    return (
        f'the generator of {abridge(moving)} gets gradients and does not change: {why}. Add model.csg.parameters() to '
        "the optimizer's parameter groups, or set freeze_generator=True if codes alone are to train"
    )


def _rates(optimizers: Iterable[Optimizer]) -> dict[int, Rate]:
    """Return how each parameter is moved, by its identity."""
    return {
        id(parameter): Rate(float(group.get('lr', 1)), float(group.get('weight_decay') or 0))
        for optimizer in optimizers
        for group in optimizer.param_groups
        for parameter in group['params']
    }


def _describe_layers(codes: Mapping[str, Tensor], rates: Mapping[int, Rate], of_generator: Rate) -> str:
    """Describe layers that move with a generator that trains, and are not meant to, or not so fast."""
    reasons = defaultdict(list)
    for name, code in codes.items():
        rate = rates.get(id(code), NOT_HELD)
        if not code.requires_grad:
            reasons['frozen'].append(name)
        elif rate is NOT_HELD:
            reasons['in no optimizer'].append(name)
        elif rate.lr == 0:
            reasons['at a learning rate of 0'].append(name)
        elif rate.lr < of_generator.lr:
            reasons[f"at a lower learning rate than the generator's {of_generator.lr:g}"].append(name)
        elif rate.weight_decay < of_generator.weight_decay:
            reasons[f"with less weight decay than the generator's {of_generator.weight_decay:g}"].append(name)
    if not reasons:
        return ''
    found = '; '.join(f'{reason}: {abridge(names)}' for reason, names in reasons.items())
    return (
        f'these layers change as fast as their generator, which trains on: {found}. To hold them, freeze them before '
        'retrofit, exclude them, give them a dict of their own in csg, or set freeze_generator=True'
    )
