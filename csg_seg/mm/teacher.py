"""Distillation: a trained network, the teacher, adds losses to the training of a smaller one, the student."""

import difflib
import math
from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from fnmatch import fnmatchcase
from functools import partial
from typing import Any

import torch
from mmengine.registry import MODELS
from torch import Tensor, nn
from torch.nn import functional

from csg_seg.errors import CSGError
from csg_seg.layers.bank import BANK
from csg_seg.mm.checkpoints.reading import load_weights, read_checkpoint

# The modules that compute the class scores in mmpretrain's and mmseg's networks.
LOGITS_LAYERS = ('head.fc', 'decode_head.conv_seg', 'decode_head.fc_seg')


class Teacher:
    """A trained network whose outputs a student learns to reproduce.

    It is built at the first training step, in evaluation mode. It is not a part of the
    student, so checkpoints, optimizers, averages and tests do not contain it.

    Args:
        checkpoint: the teacher's weights, a local file.
        model: the teacher's model config. ``CSGModel`` uses the student's config before the retrofit by default.
        labels: factor of the student's own losses.
        logits: factor of the divergence of class probabilities, for each image or
            pixel. Hinton et al., "Distilling the Knowledge in a Neural Network", 2015.
        temperature: divides the class scores in ``logits`` and ``channels``.
        channels: factor of the divergence of each class's distribution over the pixels.
            Shu et al., "Channel-Wise Knowledge Distillation for Dense Prediction", ICCV 2021.
        features: factor of the squared difference between feature maps, relative to the
            teacher's squares, averaged over the maps. Romero et al., "FitNets", ICLR 2015.
        layers: patterns for the names of the modules whose outputs ``features`` compares. Both
            networks have these names. ``*`` matches a part of a name between dots:
            'backbone.layer*.*' matches all blocks of a ResNet.
        logits_layer: name of the module that computes the class scores. By default, one of ``LOGITS_LAYERS``.

    Raises:
        CSGError: an argument has a wrong type or is out of range, or all factors are 0.
    """

    def __init__(
        self,
        checkpoint: str,
        model: Mapping[str, Any],
        *,
        labels: float = 1.0,
        logits: float = 1.0,
        temperature: float = 4.0,
        channels: float = 0.0,
        features: float = 0.0,
        layers: str | Sequence[str] = ('backbone',),
        logits_layer: str | None = None,
    ):
        factors = dict(labels=labels, logits=logits, channels=channels, features=features)
        for name, value in {**factors, 'temperature': temperature}.items():
            if not isinstance(value, (int, float)) or not math.isfinite(value):
                raise CSGError(f'teacher: {name} must be a number; got {value!r}')
            if value < 0:
                raise CSGError(f'teacher: {name} must not be negative; got {value}')
        if temperature == 0:
            raise CSGError('teacher: temperature must be above 0; got 0')
        if not any(factors.values()):
            raise CSGError(f'teacher: {", ".join(factors)} are all 0, so there is nothing to learn from; set one')
        if '://' in str(checkpoint):
            raise CSGError(f'teacher: {checkpoint} is not a local file; download it first')
        self.checkpoint = checkpoint
        self.model = model
        self.factors = factors
        self.temperature = temperature
        self.patterns = [layers] if isinstance(layers, str) else list(layers)
        if features and not self.patterns:
            raise CSGError('teacher: features compares the outputs of layers, and layers is empty; name some')
        self.layers: list[str] = []
        self.logits_layer = logits_layer or ''
        self._network: nn.Module | None = None
        self._outputs: dict[tuple[str, str], Any] = {}
        self._is_recording = False

    def __getstate__(self) -> dict[str, Any]:
        # A copy of the student, such as an EMA, does not need a copy of the teacher's network.
        return {**self.__dict__, '_network': None, '_outputs': {}}

    def attach(self, student: nn.Module) -> nn.Module:
        """Add the teacher's losses to every training step of a student, and return the student.

        Raises:
            CSGError: the student has none of the named layers.
        """
        if self.factors['logits'] or self.factors['channels']:
            self.logits_layer = self.logits_layer or _find_logits_layer(student)
        if self.factors['features']:
            self.layers = match_layers(student, self.patterns)
        self._record_outputs('student', student)
        student.register_forward_pre_hook(self._run_teacher, with_kwargs=True)
        student.register_forward_hook(self._add_losses, with_kwargs=True)
        return student

    def _record_outputs(self, who: str, network: nn.Module) -> None:
        for name in [*self.layers, *filter(None, [self.logits_layer])]:
            try:
                module = network.get_submodule(name)
            except AttributeError:
                raise CSGError(f'teacher: the {who} has no layer {name!r}; set layers or logits_layer') from None
            module.register_forward_hook(partial(self._record, who, name))

    def _record(self, who: str, name: str, module: nn.Module, inputs: Any, output: Any) -> None:
        if self._is_recording:
            self._outputs[who, name] = output

    def _run_teacher(self, student: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        if kwargs.get('mode') != 'loss':
            return
        images = kwargs['inputs'] if 'inputs' in kwargs else args[0]
        if self._network is None:
            self._network = self._build(student).to(images.device)
        self._outputs.clear()
        self._is_recording = True
        with torch.no_grad():
            self._network(images, mode='tensor')

    def _add_losses(self, student: nn.Module, args: tuple, kwargs: dict[str, Any], losses: Any) -> Any:
        if kwargs.get('mode') != 'loss':
            return losses
        labels = self.factors['labels']
        # mmengine logs the sum of all losses as 'loss', unless one of them has that name.
        names = {name: 'loss_labels' if name == 'loss' else name for name in losses}
        taught = {names[name]: _scale(each, labels) if 'loss' in name else each for name, each in losses.items()}
        taught |= {f'loss_teacher_{name}': value for name, value in self._compare()}
        self._outputs.clear()
        self._is_recording = False
        return taught

    def _compare(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the name and value of each loss whose factor is not 0."""
        factors, temperature = self.factors, self.temperature
        if factors['logits'] or factors['channels']:
            mine, wanted = self._pair(self.logits_layer)
            if factors['logits']:
                yield 'logits', factors['logits'] * divergence(mine, wanted, temperature, dim=1)
            if factors['channels']:
                if mine.ndim != 4:
                    raise CSGError('teacher: channels compares pixels, this network classifies; set channels=0')
                flat = divergence(mine.flatten(2), wanted.flatten(2), temperature, dim=2)
                yield 'channels', factors['channels'] * flat
        if factors['features']:
            maps = [pair for name in self.layers for pair in zip(*map(_as_list, self._pair(name)), strict=True)]
            errors = [relative_squared_error(*pair) for pair in maps]
            yield 'features', factors['features'] * torch.stack(errors).mean()

    def _pair(self, name: str) -> tuple[Any, Any]:
        """Return a module's outputs in the student and in the teacher."""
        for who in ('student', 'teacher'):
            if (who, name) not in self._outputs:
                raise CSGError(f'teacher: layer {name!r} is not called as a module in the {who}; name one inside it')
        mine, wanted = (self._outputs[who, name] for who in ('student', 'teacher'))
        for one, other in zip(_as_list(mine), _as_list(wanted), strict=True):
            if one.shape != other.shape:
                raise CSGError(
                    f'teacher: the output of {name} is {tuple(other.shape)} in the teacher and {tuple(one.shape)} in '
                    'the student; compare other layers, or set features=0'
                )
        return mine, wanted

    def _build(self, student: nn.Module) -> nn.Module:
        # A run that resumes would draw these random numbers again.
        with torch.random.fork_rng(devices=[]):
            network = MODELS.build(deepcopy({**self.model, 'init_cfg': None}))
        load_weights(network, read_checkpoint(self.checkpoint)['state_dict'])
        network.eval().requires_grad_(False)
        if any(_is_channels_last(parameter) for parameter in student.parameters()):
            network.to(memory_format=torch.channels_last)
        self._record_outputs('teacher', network)
        return network


def divergence(logits: Tensor, wanted: Tensor, temperature: float, *, dim: int) -> Tensor:
    """Compute the Kullback-Leibler divergence of softened logits, times the squared temperature.

    Args:
        logits: the student's, of any shape.
        wanted: the teacher's, of the same shape.
        temperature: divides both.
        dim: dimension along which probabilities sum to one. The result is the mean over all others.
    """
    mine, wanted = (functional.log_softmax(each / temperature, dim=dim) for each in (logits, wanted))
    pointwise = functional.kl_div(mine, wanted, log_target=True, reduction='none')
    return temperature**2 * pointwise.sum(dim).mean()


def relative_squared_error(values: Tensor, wanted: Tensor) -> Tensor:
    """Divide the sum of squared differences by the sum of the second tensor's squares, in float32."""
    wanted = wanted.float()
    return (values.float() - wanted).square().sum() / wanted.square().sum()


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
            close = difflib.get_close_matches(pattern, names, n=3, cutoff=0.3)
            like = f'there are {", ".join(close)}' if close else f'names look like {names[-1]!r}'
            raise CSGError(f'teacher: layers pattern {pattern!r} names no module; {like}')
        found += [name for name in matching if name not in found]
    return found


def _matches(name: str, pattern: str) -> bool:
    parts, wanted = name.split('.'), pattern.split('.')
    return len(parts) == len(wanted) and all(map(fnmatchcase, parts, wanted))


def _find_logits_layer(network: nn.Module) -> str:
    names = {name for name, _ in network.named_modules()}
    found = next((name for name in LOGITS_LAYERS if name in names), None)
    if found is None:
        raise CSGError(f'teacher: the model has none of {", ".join(LOGITS_LAYERS)}; set logits_layer')
    return found


def _is_channels_last(weight: Tensor) -> bool:
    return weight.ndim == 4 and not weight.is_contiguous() and weight.is_contiguous(memory_format=torch.channels_last)


def _as_list(output: Any) -> list[Tensor]:
    return list(output) if isinstance(output, (tuple, list)) else [output]


def _scale(value: Any, factor: float) -> Any:
    return [each * factor for each in value] if isinstance(value, list) else value * factor
