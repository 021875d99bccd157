"""Warn once, in the first training steps, if generators do not train as the optimizer's settings suggest.

A generated weight depends on its layer's code and on the generator. A layer that is frozen or has its own learning rate
still changes if its generator trains with other layers; a generator that is in no optimizer does not change at all.
Both are easy to miss, because parameter groups are made by layer and a generator belongs to many layers. An optimizer
that was made before retrofit holds the dense weights, and trains neither codes nor generators. A network that was
trained before retrofit starts from new weights unless they are fitted.
"""

import gc
import warnings
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary, WeakSet, ref

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from csg_seg.errors import CSGWarning, abridge
from csg_seg.generators.linear import Generator

from .conv import CSGConv
from .root import CSGRoot, refresh_layers

# A network without a gradient is no longer watched after this many steps of any optimizer.
STEPS = 100


class Rate(NamedTuple):
    """How an optimizer changes a parameter.

    ``state`` is 'held', 'frozen' if the parameter gets no gradient, or 'left out' if it is in no optimizer.
    """

    lr: float
    weight_decay: float
    state: str = 'held'


NOT_HELD, FROZEN = Rate(0.0, 0.0, 'left out'), Rate(0.0, 0.0, 'frozen')
# Why a generator does not change.
NO_OPTIMIZER, NO_RATE = 'no optimizer holds it', 'its learning rate is 0'
# Why it should not.
UNFROZEN = 'its settings have freeze_generator=True'
# Names of a conv's parameter that holds its code, or from which pruning or a parametrisation computes it.
CODES = {'code', 'code_orig', 'code_g', *(f'parametrizations.code.original{number}' for number in ('', '0'))}
MADE_TOO_EARLY = (
    'the optimizer was made before retrofit or materialise: it holds weights that the network no longer has, and their '
    'layers do not train. Make the optimizer afterwards.'
)
LOST = (
    'the network was trained before retrofit, which gave new start values to {}. To keep the trained weights, '
    'call csg_seg.fit(model, weights) after retrofit, with the state dict from before; in a config, load them by '
    'load_from or init_cfg. To train from new values, ignore this.'
)
MOST_NAMES = 6
Found = dict[str, list[str]]


class Watch:
    """The layers that are watched; one object per process, like torch's hooks on all optimizers."""

    def __init__(self) -> None:
        self.layers: WeakKeyDictionary[CSGConv, str] = WeakKeyDictionary()
        self.done: WeakSet[CSGConv] = WeakSet()
        self.roots: WeakSet[nn.Module] = WeakSet()
        self.replaced: list[ref[Tensor]] = []
        self.lost: WeakKeyDictionary[CSGConv, str] = WeakKeyDictionary()
        self.steps_left = 0
        self.hooks: list[Any] = []
        self.is_over = False

    def begin(self, layers: Mapping[str, CSGConv], root: nn.Module | None = None, *, again: bool = False) -> None:
        """Watch layers, by name, and those that the root gets later, until the next step of their generator.

        Without ``again``, layers that have been watched are not watched a second time.
        """
        if again:
            self.done.difference_update(layers.values())
        if root is not None:
            self.roots.add(root)
        new = self._new(layers)
        self.layers.update(new)
        self._start(anew=bool(new))

    def _start(self, *, anew: bool) -> None:
        self.steps_left = STEPS
        self.is_over = self.is_over and not anew
        if anew and not self.hooks:
            self.hooks = [
                register_optimizer_step_pre_hook(self.refresh),
                register_optimizer_step_post_hook(self.look),
            ]

    def note_replaced(self, weights: Iterable[Tensor]) -> None:
        """Remember parameters that a network no longer has, in case an optimizer still holds them."""
        self.replaced = [each for each in self.replaced if each() is not None] + [*map(ref, weights)]
        self._start(anew=True)

    def note_lost(self, layers: Mapping[str, CSGConv]) -> None:
        """Remember layers, by name, that had trained weights before retrofit."""
        self.lost.update({conv: name for name, conv in layers.items()})

    def warn_of_lost(self, layers: Collection[CSGConv], *, stacklevel: int) -> None:
        """Warn, once, of the layers among these that lost trained weights in retrofit, which were not loaded since.

        Args:
            layers: to examine.
            stacklevel: as for ``warnings.warn``, seen from the caller.
        """
        names = [name for name in map(self.lost.get, layers) if name is not None]
        if names:
            self.note_loaded(layers)
            warnings.warn(LOST.format(abridge(names, most=MOST_NAMES)), CSGWarning, stacklevel=stacklevel + 1)

    def note_loaded(self, layers: Iterable[CSGConv]) -> None:
        """Forget layers whose weights have been loaded since."""
        for conv in layers:
            self.lost.pop(conv, None)

    def _new(self, layers: Mapping[str, CSGConv]) -> dict[CSGConv, str]:
        return {conv: name for name, conv in layers.items() if conv not in self.done}

    def _forget(self) -> None:
        self.layers.clear()
        self.roots.clear()
        self.replaced.clear()
        self.lost.clear()

    def refresh(self, *_: Any) -> None:
        """Look up the layers of all roots before a step changes generators: copied layers may be new."""
        if self.is_over:
            return
        roots = [refresh_layers(root) for root in [*self.roots] if isinstance(root, CSGRoot)]
        current = {conv for layers in roots for conv in layers.values()}
        generators = {conv.generator for conv in current}
        for conv in [*self.layers]:
            if isinstance(conv, CSGConv) and conv.generator in generators and conv not in current:
                self.layers.pop(conv)  # replaced since
        for layers in roots:
            self.layers.update(self._new(layers))

    def look(self, optimizer: Optimizer, *_: Any) -> None:
        """Examine, after a step, the generators that had a gradient."""
        if self.is_over:
            return
        held = _rates([optimizer])
        if any(id(weight()) in held for weight in self.replaced):
            self.replaced.clear()
            warnings.warn(MADE_TOO_EARLY, CSGWarning, stacklevel=3)
        trained = [conv for conv in self.lost if isinstance(conv, CSGConv) and id(conv.code) in held]
        self.warn_of_lost(trained, stacklevel=3)
        by_generator: dict[Generator, dict[str, CSGConv]] = defaultdict(dict)
        for conv, name in [*self.layers.items()]:
            if isinstance(conv, CSGConv):
                layers = by_generator[conv.generator]
                number, own = 1, name
                while own in layers:  # networks that share generators may have the same names
                    number, own = number + 1, f'{name} of network {number + 1}'
                layers[own] = conv
            else:  # materialised since
                self.layers.pop(conv)
        seen = [(layers, examine(generator, layers, optimizer)) for generator, layers in by_generator.items()]
        for layers, found in seen:
            if found is not None:
                self.done.update(layers.values())
                for conv in layers.values():
                    self.layers.pop(conv, None)
        text = describe([found for _, found in seen if found])
        if text:
            warnings.warn(text, CSGWarning, stacklevel=3)  # where the user's program calls step()
        self.steps_left -= 1
        # The hooks themselves go in the next forward pass: torch is iterating over hooks here.
        if not self.layers or self.steps_left <= 0:
            self._forget()
            self.is_over = True

    def end(self) -> None:
        """Stop watching, and remove the hooks on optimizers."""
        self._forget()
        self.is_over = False
        for hook in self.hooks:
            hook.remove()
        self.hooks = []


WATCH = Watch()


def examine(generator: Generator, layers: Mapping[str, CSGConv], optimizer: Optimizer) -> Found | None:
    """Find the layers that change otherwise than the optimizer's settings suggest.

    Args:
        generator: of these layers.
        layers: by name.
        optimizer: has just made a step.

    Returns:
        Names of layers by problem, '' for none; None if the step did not concern this generator, or all its rates
        were zero.
    """
    learning = [each for each in generator.parameters() if each.requires_grad and each.grad is not None]
    codes = {name: _code_parameter(conv) for name, conv in layers.items()}
    rates = _rates([optimizer])
    if not learning or not any(id(each) in rates for each in (*learning, *codes.values())):
        return None
    if not all(id(each) in rates for each in (*learning, *(code for code in codes.values() if code.requires_grad))):
        # Other optimizers may hold the rest.
        rates = _rates(each for each in gc.get_objects() if issubclass(type(each), Optimizer))
    of_generator = max((rates.get(id(each), NOT_HELD) for each in learning), key=lambda rate: rate.lr)
    if generator.settings.freeze_generator:
        if of_generator.lr == 0 and of_generator != NOT_HELD:
            return None
        return {'' if of_generator == NOT_HELD else UNFROZEN: [*codes]}
    found: Found = defaultdict(list)
    for name, code in codes.items():
        rate = rates.get(id(code), NOT_HELD) if code.requires_grad else FROZEN
        found[_compare(rate, of_generator)].append(name)
    is_at_rest = of_generator.lr == 0 and not {NO_OPTIMIZER, NO_RATE} & {*found}
    return None if is_at_rest else found


def _code_parameter(conv: CSGConv) -> Tensor:
    """Return a conv's code, or the parameter from which pruning or a parametrisation computes it."""
    return next((each for name, each in conv.named_parameters() if name in CODES), conv.code)


def _rates(optimizers: Iterable[Optimizer]) -> dict[int, Rate]:
    """Return the rate of each parameter, by its id."""
    return {
        id(parameter): Rate(_learning_rate(group), float(group.get('weight_decay') or 0))
        for optimizer in optimizers
        for group in getattr(optimizer, 'param_groups', ())  # one that is being made has none
        for parameter in group['params']
    }


def _learning_rate(group: Mapping[str, Any]) -> float:
    rate = group.get('lr')
    return 1.0 if rate is None else float(rate)  # some optimizers set their own


def _compare(layer: Rate, generator: Rate) -> str:
    """Return the problem with the rates of a layer's code and its generator; '' if there is none."""
    if generator.lr == 0:
        if layer.lr == 0:
            return ''
        return NO_OPTIMIZER if generator == NOT_HELD else NO_RATE
    if layer == FROZEN:
        return 'frozen'
    if layer == NOT_HELD:
        return 'in no optimizer'
    if layer.lr == 0:
        return 'at a learning rate of 0'
    if layer.lr < generator.lr:
        return f"at a lower learning rate than the generator's {generator.lr:g}"
    if layer.weight_decay < generator.weight_decay:
        return f"with less weight decay than the generator's {generator.weight_decay:g}"
    return ''


def describe(found: Iterable[Found]) -> str:
    """Describe what :func:`examine` found about several generators; '' if it found nothing."""
    layers: Found = defaultdict(list)
    for each in found:
        for reason, names in each.items():
            layers[reason] += names
    layers.pop('', None)
    texts = [
        f'the generator of {abridge(layers.pop(reason), most=MOST_NAMES)} gets gradients and does not change: '
        f"{reason}. Add model.csg.parameters() to the optimizer's parameter groups, or set freeze_generator=True if "
        'codes alone are to train. If these layers were moved into another network, its state_dict() lacks the '
        'generator: retrofit that network as a whole instead.'
        for reason in (NO_OPTIMIZER, NO_RATE)
        if reason in layers
    ]
    if UNFROZEN in layers:
        listed = abridge(layers.pop(UNFROZEN), most=MOST_NAMES)
        texts.append(
            f'the generator of {listed} is trained, although {UNFROZEN}: its requires_grad was set to True since. Call '
            'model.csg.requires_grad_(False), or remove freeze_generator from the settings.'
        )
    if layers:
        listed = ' and '.join(f'{reason} ({abridge(names, most=MOST_NAMES)})' for reason, names in layers.items())
        texts.append(
            f'the generator is trained, so all its layers change, also those {listed}. To keep them fixed, '
            'freeze them before retrofit, exclude them, give them a dict of their own in csg, or set '
            'freeze_generator=True.'
        )
    return ' '.join(texts)
