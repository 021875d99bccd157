"""From a trained dense network to a generated one: distillation, and dense weights that fade out."""

import difflib
import math
from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from fnmatch import fnmatchcase
from functools import partial
from typing import Any

import torch
from mmengine.logging import MessageHub
from mmengine.registry import MODELS
from torch import Tensor, nn
from torch.nn import functional

from csg_seg.errors import CSGError
from csg_seg.layers.bank import BANK
from csg_seg.layers.conv import generated_convs
from csg_seg.mm.checkpoints.reading import load_weights, read_checkpoint

# Where the class scores of mmpretrain's and mmseg's networks come from.
LOGITS_LAYERS = ('head.fc', 'decode_head.conv_seg', 'decode_head.fc_seg')


class Teacher:
    """A trained dense network that takes part in the training of a smaller one, and in nothing else.

    It is built at the first training step, in evaluation mode, and is no part of the
    student: checkpoints, optimizer, averages and tests never see it.

    Args:
        checkpoint: the dense network's weights.
        model: its model config; by default the student's before it was retrofitted.
        labels: factor on the student's own losses.
        logits: factor on the divergence of class probabilities, for each image or
            pixel. Hinton et al., "Distilling the Knowledge in a Neural Network", 2015.
        temperature: of ``logits`` and ``channels``.
        channels: factor on the divergence of each class's distribution over the pixels.
            Shu et al., "Channel-Wise Knowledge Distillation for Dense Prediction", ICCV 2021.
        features: factor on the squared difference of feature maps over the squared
            teacher's, mean over maps. Romero et al., "FitNets", ICLR 2015.
        layers: patterns of module names, the same in both networks, whose outputs
            ``features`` compares; ``*`` stands for part of one name between dots, as in
            'backbone.layer*.*', all blocks of a ResNet.
        logits_layer: name of the module that gives class scores; found by itself in
            mmpretrain's and mmseg's common heads.
        anneal: share of the training over which generated layers pass from the
            teacher's weights to their own; 0 for none. Meanwhile the network in
            evaluation is already the generated one.
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
        anneal: float = 0.0,
    ):
        factors = dict(labels=labels, logits=logits, channels=channels, features=features)
        for name, factor in {**factors, 'temperature': temperature, 'anneal': anneal}.items():
            if not isinstance(factor, (int, float)) or not math.isfinite(factor):
                raise CSGError(f'teacher: {name} must be a number; got {factor!r}')
        for name, factor in factors.items():
            if factor < 0:
                raise CSGError(f'teacher: {name} must not be negative; got {factor}')
        if not any(factors.values()):
            raise CSGError(f'teacher: {", ".join(factors)} are all 0, so there is nothing to learn from; set one')
        if not 0 <= anneal <= 1:
            raise CSGError(f'teacher: anneal is a share of the training, from 0 to 1; got {anneal}')
        if '://' in str(checkpoint):
            raise CSGError(f'teacher: {checkpoint} is no local file; download it first')
        if temperature <= 0:
            raise CSGError(f'teacher: temperature must be above 0; got {temperature}')
        self.checkpoint = checkpoint
        self.model = model
        self.factors = factors
        self.temperature = temperature
        self.patterns = [layers] if isinstance(layers, str) else list(layers)
        if features and not self.patterns:
            raise CSGError('teacher: features compares the outputs of layers, and layers is empty; name some')
        self.layers: list[str] = []
        self.logits_layer = logits_layer
        self.anneal = anneal
        self._network: nn.Module | None = None
        self._outputs: dict[tuple[str, str], Any] = {}
        self._watching = False

    def __getstate__(self) -> dict[str, Any]:
        # A copy of the student, such as its average, needs no copy of the dense network.
        return {**self.__dict__, '_network': None, '_outputs': {}}

    def attach(self, student: nn.Module) -> nn.Module:
        """Let every training step of the student go past the teacher; return the student.

        Raises:
            CSGError: the student has none of the named layers.
        """
        if self.factors['logits'] or self.factors['channels']:
            self.logits_layer = self.logits_layer or _find_logits_layer(student)
        if self.factors['features']:
            self.layers = match_layers(student, self.patterns)
        self._watch('student', student)
        student.register_forward_pre_hook(self._before_forward, with_kwargs=True)
        student.register_forward_hook(self._after_forward, with_kwargs=True)
        return student

    def _watch(self, who: str, network: nn.Module) -> None:
        for name in [*self.layers, *filter(None, [self.logits_layer])]:
            try:
                module = network.get_submodule(name)
            except AttributeError:
                raise CSGError(f'teacher: the {who} has no layer {name!r}; set layers or logits_layer') from None
            module.register_forward_hook(partial(self._keep, who, name))

    def _keep(self, who: str, name: str, module: nn.Module, inputs: Any, output: Any) -> None:
        if self._watching:
            self._outputs[who, name] = output

    def _before_forward(self, student: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        if kwargs.get('mode') != 'loss':
            return
        self._outputs.clear()
        self._watching = True
        images = kwargs.get('inputs', args[0] if args else None)
        if self._network is None:
            self._network = self._build(student).to(images.device)
        if self.anneal:
            self._blend(student)

    def _blend(self, student: nn.Module) -> None:
        """Give generated layers their share of the dense weight at this step."""
        hub = MessageHub.get_current_instance()
        share = (hub.get_info('iter', 0) + 1) / (self.anneal * hub.get_info('max_iters', 1))
        for name, conv in generated_convs(student):
            dense = self._network.get_submodule(name).weight
            conv.blend = (dense, share) if share < 1 else None

    def _after_forward(self, student: nn.Module, args: tuple, kwargs: dict[str, Any], losses: Any) -> Any:
        if kwargs.get('mode') != 'loss':
            return losses
        images = kwargs.get('inputs', args[0] if args else None)
        if any(self.factors[name] for name in ('logits', 'channels', 'features')):
            with torch.no_grad():
                self._network(images, mode='tensor')
        labels = self.factors['labels']
        # mmengine logs the sum of all losses as 'loss', unless one of them has that name.
        names = {name: 'loss_labels' if name == 'loss' else name for name in losses}
        taught = {names[name]: _scale(each, labels) if 'loss' in name else each for name, each in losses.items()}
        taught |= {f'loss_teacher_{name}': value for name, value in self._compare()}
        self._outputs.clear()
        self._watching = False
        return taught

    def _compare(self) -> Iterator[tuple[str, Tensor]]:
        """Yield each kind of difference between the two networks that has a factor, and its loss."""
        factors, temperature = self.factors, self.temperature
        if factors['logits'] or factors['channels']:
            pair = self._pair(self.logits_layer)
            if factors['logits']:
                yield 'logits', factors['logits'] * divergence(*pair, temperature, dim=1)
            if factors['channels']:
                if pair[0].ndim != 4:
                    raise CSGError('teacher: channels compares pixels, this network classifies; set channels=0')
                flat = [each.flatten(2) for each in pair]
                yield 'channels', factors['channels'] * divergence(*flat, temperature, dim=2)
        if factors['features']:
            maps = [pair for name in self.layers for pair in zip(*map(_as_list, self._pair(name)), strict=True)]
            errors = [relative_squared_error(*pair) for pair in maps]
            yield 'features', factors['features'] * torch.stack(errors).mean()

    def _pair(self, name: str) -> tuple[Any, Any]:
        for who in ('student', 'teacher'):
            if (who, name) not in self._outputs:
                raise CSGError(f'teacher: layer {name!r} was not run by itself in the {who}; name a module inside it')
        mine, wanted = (self._outputs[who, name] for who in ('student', 'teacher'))
        for one, other in zip(_as_list(mine), _as_list(wanted), strict=True):
            if one.shape != other.shape:
                raise CSGError(
                    f'teacher: {name} gives {tuple(other.shape)} in the teacher and {tuple(one.shape)} in the student; '
                    'compare other layers, or set features=0'
                )
        return mine, wanted

    def _build(self, student: nn.Module) -> nn.Module:
        # Random numbers drawn here would be missing from a run that resumes.
        with torch.random.fork_rng(devices=[]):
            network = MODELS.build(deepcopy({**self.model, 'init_cfg': None}))
        load_weights(network, read_checkpoint(self.checkpoint)['state_dict'])
        network.eval().requires_grad_(False)
        if any(_is_channels_last(parameter) for parameter in student.parameters()):
            network.to(memory_format=torch.channels_last)
        self._watch('teacher', network)
        if self.anneal:
            _check_dense_twin(student, network)
        return network


def _check_dense_twin(student: nn.Module, network: nn.Module) -> None:
    shapes = {name: tensor.shape for name, tensor in network.state_dict().items()}
    for name, conv in generated_convs(student):
        if shapes.get(f'{name}.weight') != conv.weight_shape:
            raise CSGError(f"teacher: anneal wants the student's dense twin, and {name} differs; set anneal=0")


def divergence(logits: Tensor, wanted: Tensor, temperature: float, *, dim: int) -> Tensor:
    """Return the Kullback-Leibler divergence of softened logits, times the squared temperature.

    Args:
        logits: the student's, any shape.
        wanted: the teacher's, of the same shape.
        temperature: what both are divided by.
        dim: the probabilities along it sum to one; the mean is taken over all others.
    """
    mine, wanted = (functional.log_softmax(each / temperature, dim=dim) for each in (logits, wanted))
    pointwise = functional.kl_div(mine, wanted, log_target=True, reduction='none')
    return temperature**2 * pointwise.sum(dim).mean()


def relative_squared_error(values: Tensor, wanted: Tensor) -> Tensor:
    """Return the squared difference of two tensors over the second's squares, both summed in float32."""
    wanted = wanted.float()
    return (values.float() - wanted).square().sum() / wanted.square().sum()


def _find_logits_layer(network: nn.Module) -> str:
    names = {name for name, _ in network.named_modules()}
    found = next((name for name in LOGITS_LAYERS if name in names), None)
    if found is None:
        raise CSGError(f'teacher: no layer of class scores found among {", ".join(LOGITS_LAYERS)}; set logits_layer')
    return found


def _is_channels_last(weight: Tensor) -> bool:
    return weight.ndim == 4 and not weight.is_contiguous() and weight.is_contiguous(memory_format=torch.channels_last)


def match_layers(network: nn.Module, patterns: Sequence[str]) -> list[str]:
    """Return the names of the modules that patterns stand for, each in the network's order.

    Raises:
        CSGError: a pattern stands for none.
    """
    names = [name for name, _ in network.named_modules() if name.split('.')[0] != BANK]
    found: list[str] = []
    for pattern in patterns:
        fitting = [name for name in names if name.count('.') == pattern.count('.') and _fits(name, pattern)]
        if not fitting:
            raise CSGError(f'teacher: layers pattern {pattern!r} names no module; {_like(pattern, names)}')
        found += [name for name in fitting if name not in found]
    return found


def _like(pattern: str, names: Sequence[str]) -> str:
    close = difflib.get_close_matches(pattern, names, n=3, cutoff=0.3)
    return f'there are {", ".join(close)}' if close else f'names look like {names[-1]!r}'


def _fits(name: str, pattern: str) -> bool:
    return all(map(fnmatchcase, name.split('.'), pattern.split('.')))


def _as_list(output: Any) -> list[Tensor]:
    return list(output) if isinstance(output, (tuple, list)) else [output]


def _scale(value: Any, factor: float) -> Any:
    return [each * factor for each in value] if isinstance(value, list) else value * factor
