"""Distillation: a trained network, the teacher, adds losses to the training of a smaller one, the student."""

import math
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from functools import partial
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.hooks import RemovableHandle

from .errors import CSGError, nearest
from .generators.settings import read_patterns
from .layers.bank import BANK, find_roots

# Where networks that return several things have the class scores.
SCORES = ('out', 'logits')


class Teacher:
    """A trained network whose outputs a student learns to reproduce.

    ::

        teacher = csg_seg.Teacher(student, network, logits=0.1, features=3.0, layers=['layer*.*'])
        for images, labels in loader:
            loss = criterion(student(images), labels) + teacher.loss(images)

    The teacher's network is put into evaluation mode and frozen. It is not a part of the student, so checkpoints,
    optimizers and copies of the student do not contain it.

    Args:
        student: the network that learns, usually retrofitted.
        network: the teacher; None if :meth:`use` names it later.
        logits: factor of the divergence of class probabilities, for each image or pixel. Hinton et al., "Distilling
            the Knowledge in a Neural Network", 2015. A single class score has its sigmoid as the probability.
        temperature: divides the class scores in ``logits`` and ``channels``.
        channels: factor of the divergence of each class's distribution over the pixels. Shu et al., "Channel-Wise
            Knowledge Distillation for Dense Prediction", ICCV 2021.
        features: factor of the squared difference between feature maps, relative to the teacher's squares, averaged
            over the maps. Romero et al., "FitNets", ICLR 2015.
        layers: patterns for the names of the modules whose outputs ``features`` compares. Both networks have these
            names. ``*`` matches a part of a name between dots: 'layer*.*' matches all blocks of a ResNet. If a later
            operation changes an output in place, as a ReLU does, the changed values are compared.
        logits_layer: name of the module that computes the class scores. By default, the networks' own output: a
            tensor, the first of several, or the entry 'out' or 'logits'.

    Raises:
        CSGError: an argument has a wrong type or is out of range, all factors are 0, a pattern matches no module, or
            the two networks share parameters.
    """

    def __init__(
        self,
        student: nn.Module,
        network: nn.Module | None,
        *,
        logits: float = 1.0,
        temperature: float = 4.0,
        channels: float = 0.0,
        features: float = 0.0,
        layers: str | Sequence[str] = (),
        logits_layer: str = '',
    ):
        if not isinstance(student, nn.Module):
            raise CSGError(f'teacher: the student must be a module; got {type(student).__name__}')
        if isinstance(network, nn.Module) and any(find_roots(network)) and not any(find_roots(student)):
            raise CSGError('teacher: a CSG network would teach a dense one; the student comes first')
        if hasattr(student, '_orig_mod'):
            raise CSGError('teacher: the student is compiled; give the network inside, before it is compiled')
        self.factors = dict(logits=logits, channels=channels, features=features)
        check_factors(self.factors, temperature)
        patterns = read_patterns('teacher', 'layers', layers) or ()
        if features and not patterns:
            raise CSGError('teacher: features compares the outputs of layers, and layers is empty; name some')
        if patterns and not features:
            raise CSGError('teacher: layers are compared by features, which is 0; set features, or leave layers out')
        self._student = [weakref.ref(each) for each in student.parameters()]
        self.temperature = temperature
        self.layers = match_layers(student, patterns) if features else []
        self.logits_layer = logits_layer
        self.network: nn.Module | None = None
        self._outputs: dict[tuple[str, str], Any] = {}
        self._teacher_hooks: list[RemovableHandle] = []
        self._record_outputs('student', student)
        if network is not None:
            self.use(network)

    def __getstate__(self) -> dict[str, Any]:
        # A copy of the student, such as an EMA, does not need a copy of the teacher.
        return {**self.__dict__, 'network': None, '_outputs': {}, '_student': [], '_teacher_hooks': []}

    def use(self, network: nn.Module) -> None:
        """Take a network as the teacher, in place of an earlier one, and freeze it.

        Raises:
            CSGError: it has none of the layers to compare, or shares parameters with the student.
        """
        if not isinstance(network, nn.Module):
            raise CSGError(f'teacher: the network must be a module; got {type(network).__name__}')
        own = {id(each) for each in network.parameters()}
        if any(id(each()) in own for each in self._student):
            raise CSGError('teacher: student and teacher share parameters; copy the network before retrofit')
        hooks = self._record_outputs('teacher', network)
        for earlier in self._teacher_hooks:
            earlier.remove()
        self.network, self._teacher_hooks = network.requires_grad_(False), hooks

    def loss(self, *inputs: Any, **options: Any) -> Tensor:
        """Return the sum of the losses after a forward pass of the student.

        Args:
            inputs: of the student's last forward pass; the teacher gets them too.
            options: keyword arguments of it.

        Raises:
            CSGError: the student has not been called since, a layer was not, or outputs have different shapes.
        """
        self.observe(*inputs, **options)
        return torch.stack(list(self.compare().values())).sum()

    @torch.no_grad()
    def observe(self, *inputs: Any, **options: Any) -> None:
        """Run the teacher on the inputs of the student's forward pass, before it or after it."""
        if self.network is None:
            raise CSGError('teacher: there is no network, as in a copy of a student; call use(network) first')
        self.network.eval()(*inputs, **options)  # a trainer may have put it into training mode

    def compare(self) -> dict[str, Tensor]:
        """Return the losses by name, 'logits', 'channels' and 'features', whose factors are not 0."""
        try:
            return dict(self._losses())
        finally:
            self._outputs.clear()

    def _record_outputs(self, who: str, network: nn.Module) -> list[RemovableHandle]:
        wanted = [self.logits_layer] if self.factors['logits'] or self.factors['channels'] else []
        modules = {}
        for name in dict.fromkeys([*self.layers, *wanted]):
            try:
                modules[name] = network.get_submodule(name)
            except AttributeError:
                raise CSGError(f'teacher: the {who} has no layer {name!r}; set layers or logits_layer') from None
        return [each.register_forward_hook(partial(self._record, who, name)) for name, each in modules.items()]

    def _record(self, who: str, name: str, module: nn.Module, inputs: Any, output: Any) -> None:
        # Evaluations of the student, and copies of it, are not compared.
        if who == 'teacher' or (self.network is not None and torch.is_grad_enabled()):
            self._outputs[who, name] = output

    def _losses(self) -> Iterator[tuple[str, Tensor]]:
        factors, temperature = self.factors, self.temperature
        if factors['logits'] or factors['channels']:
            mine, wanted = self._pair(self.logits_layer, _class_scores)
            if factors['logits']:
                one, other = (_with_background(each) for each in (mine, wanted))
                yield 'logits', factors['logits'] * divergence(one, other, temperature, dim=1)
            if factors['channels']:
                if mine.ndim < 3:
                    raise CSGError('teacher: channels compares pixels, this network classifies; set channels=0')
                flat = divergence(mine.flatten(2), wanted.flatten(2), temperature, dim=2)
                yield 'channels', factors['channels'] * flat
        if factors['features']:
            maps = [pair for name in self.layers for pair in zip(*self._pair(name, _as_list), strict=True)]
            errors = [relative_squared_error(*pair) for pair in maps]
            yield 'features', factors['features'] * torch.stack(errors).mean()

    def _pair(self, name: str, read: Callable[[Any], Any]) -> tuple[Any, Any]:
        """Return what ``read`` finds in a module's outputs in the student and in the teacher."""
        for who in ('student', 'teacher'):
            if (who, name) not in self._outputs:
                called = (
                    f'layer {name!r} is not called as a module in the {who}, or a checkpoint calls it without '
                    'gradients; name one inside it, or set use_reentrant=False'
                )
                not_called = f'the {who} was not called with gradients since; call it on the same inputs before loss()'
                was_called = any(recorded == who for recorded, _ in self._outputs)
                raise CSGError(f'teacher: {called if name and was_called else not_called}')
        mine, wanted = (read(self._outputs[who, name]) for who in ('student', 'teacher'))
        pairs = list(zip_longest(_as_list(mine), _as_list(wanted)))
        if not all(isinstance(each, Tensor) for pair in pairs for each in pair):
            raise CSGError(
                f'teacher: {name or "the network"} does not return the same number of tensors in student and teacher; '
                'compare other layers'
            )
        for one, other in pairs:
            if one.shape != other.shape:
                raise CSGError(
                    f'teacher: the output of {name or "the network"} is {tuple(other.shape)} in the teacher and '
                    f'{tuple(one.shape)} in the student; give both the same inputs, or compare other layers'
                )
        return mine, wanted


def check_factors(factors: Mapping[str, Any], temperature: Any) -> None:
    """Check the factors of losses and the temperature.

    Raises:
        CSGError: one has a wrong type or is out of range, or all factors are 0.
    """
    for name, value in {**factors, 'temperature': temperature}.items():
        if not isinstance(value, (int, float)) or not math.isfinite(value):
            raise CSGError(f'teacher: {name} must be a number; got {value!r}')
        if value < 0:
            raise CSGError(f'teacher: {name} must not be negative; got {value}')
    if temperature == 0:
        raise CSGError('teacher: temperature must be above 0; got 0')
    if not any(factors.values()):
        raise CSGError(f'teacher: {", ".join(factors)} are all 0, so there is nothing to learn from; set one')


def divergence(logits: Tensor, wanted: Tensor, temperature: float, *, dim: int) -> Tensor:
    """Compute the Kullback-Leibler divergence of softened logits, times the squared temperature, in float32.

    Args:
        logits: the student's, of any shape.
        wanted: the teacher's, of the same shape.
        temperature: divides both.
        dim: dimension along which probabilities sum to one. The result is the mean over all others.
    """
    mine, wanted = (functional.log_softmax(each.float() / temperature, dim=dim) for each in (logits, wanted))
    pointwise = functional.kl_div(mine, wanted, log_target=True, reduction='none')
    return temperature**2 * pointwise.sum(dim).mean()


def relative_squared_error(values: Tensor, wanted: Tensor) -> Tensor:
    """Divide the sum of squared differences by the sum of the second tensor's squares, in float32; 0 if that is 0."""
    wanted = wanted.float()
    size = wanted.square().sum()
    return (values.float() - wanted).square().sum() / size.where(size > 0, math.inf)


def match_layers(network: nn.Module, patterns: Sequence[str]) -> list[str]:
    """Return the names of the modules that match a pattern, by pattern and then in the network's order.

    Raises:
        CSGError: a pattern matches no module.
    """
    names = [name for name, _ in network.named_modules() if name.split('.')[0] != BANK]
    found: list[str] = []
    for pattern in patterns:
        matching = [name for name in names if _matches(name, pattern)]
        if not matching:
            raise CSGError(f'teacher: layers pattern {pattern!r} names no module; {nearest(pattern, names)}')
        found += [name for name in matching if name not in found]
    return found


def _matches(name: str, pattern: str) -> bool:
    parts, wanted = name.split('.'), pattern.split('.')
    return len(parts) == len(wanted) and all(map(fnmatchcase, parts, wanted))


def _class_scores(output: Any) -> Tensor:
    """Return the class scores in a network's output.

    Raises:
        CSGError: there are none.
    """
    if isinstance(output, Mapping):
        output = next((output[key] for key in SCORES if key in output), None)
    elif isinstance(output, (tuple, list)) and output:
        output = output[0]
    if not isinstance(output, Tensor):
        raise CSGError('teacher: there are no class scores in the output of the network; set logits_layer')
    return output


def _with_background(scores: Tensor) -> Tensor:
    """Put a score of 0 before a single class score, because softmax over both is the sigmoid of the one."""
    return torch.cat([torch.zeros_like(scores), scores], dim=1) if scores.shape[1] == 1 else scores


def _as_list(output: Any) -> list[Tensor]:
    if isinstance(output, Mapping):
        return list(output.values())
    return list(output) if isinstance(output, (tuple, list)) else [output]
