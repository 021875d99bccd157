"""The teacher of a config: a network that is built from its own config when training begins."""

from collections.abc import Mapping, Sequence
from copy import deepcopy
from typing import Any

import torch
from mmengine.registry import MODELS
from torch import Tensor, nn

from csg_seg import distillation
from csg_seg.distillation import check_factors
from csg_seg.errors import CSGError
from csg_seg.layers.bank import find_bank
from csg_seg.mm.checkpoints.reading import generator_names, load_weights, read_checkpoint

# The modules that compute the class scores in mmpretrain's and mmseg's networks.
LOGITS_LAYERS = ('head.fc', 'decode_head.conv_seg', 'decode_head.fc_seg')


class ConfiguredTeacher:
    """The teacher of a model of mmengine, which adds its losses to those of each training step.

    It is built at the first training step. See :class:`csg_seg.distillation.Teacher`.

    Args:
        checkpoint: the teacher's weights, a local file.
        model: the teacher's model config. ``CSGModel`` uses the student's config before the retrofit by default.
        labels: factor of the student's own losses.
        logits, temperature, channels, features: as for :class:`csg_seg.distillation.Teacher`.
        layers: likewise; ``('backbone',)`` by default.
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
        layers: str | Sequence[str] | None = None,
        logits_layer: str | None = None,
    ):
        factors = dict(logits=logits, channels=channels, features=features)
        check_factors(dict(labels=labels, **factors), temperature)
        if '://' in str(checkpoint):
            raise CSGError(f'teacher: {checkpoint} is not a local file; download it first')
        self.checkpoint = checkpoint
        self.model = model
        self.labels = labels
        if layers is None:
            layers = ('backbone',) if features else ()
        self.options: dict[str, Any] = dict(temperature=temperature, layers=layers, **factors)
        self.logits_layer = logits_layer or ''
        self.taught_by: distillation.Teacher | None = None  # None if only labels teach

    def attach(self, student: nn.Module) -> nn.Module:
        """Add the teacher's losses to every training step of a student, and return the student.

        Raises:
            CSGError: the student has none of the named layers.
        """
        if self.options['logits'] or self.options['channels']:
            self.logits_layer = self.logits_layer or _find_logits_layer(student)
        if any(self.options[name] for name in ('logits', 'channels', 'features')):
            self.taught_by = distillation.Teacher(student, None, logits_layer=self.logits_layer, **self.options)
            student.register_forward_pre_hook(self._run_teacher, with_kwargs=True)
        student.register_forward_hook(self._add_losses, with_kwargs=True)
        return student

    def _run_teacher(self, student: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        if kwargs.get('mode') != 'loss':
            return
        assert self.taught_by is not None
        images = kwargs['inputs'] if 'inputs' in kwargs else args[0]
        if self.taught_by.network is None:
            self.taught_by.use(self._build(student).to(images.device))
        self.taught_by.observe(images, mode='tensor')

    def _add_losses(self, student: nn.Module, args: tuple, kwargs: dict[str, Any], losses: Any) -> Any:
        if kwargs.get('mode') != 'loss':
            return losses
        # mmengine logs the sum of all losses as 'loss', unless one of them has that name.
        names = {name: 'loss_labels' if name == 'loss' else name for name in losses}
        taught = {names[name]: _scale(each, self.labels) if 'loss' in name else each for name, each in losses.items()}
        if self.taught_by is not None:
            taught |= {f'loss_teacher_{name}': value for name, value in self.taught_by.compare().items()}
        return taught

    def _build(self, student: nn.Module) -> nn.Module:
        # A run that resumes would draw these random numbers again.
        with torch.random.fork_rng(devices=[]):
            network = MODELS.build(deepcopy({**self.model, 'init_cfg': None}))
        weights = read_checkpoint(self.checkpoint)['state_dict']
        if find_bank(network) is None and generator_names(weights):
            raise CSGError(
                f'teacher: {self.checkpoint} is a CSG checkpoint, and this teacher is a dense network; give a dense '
                'checkpoint, or materialise this one'
            )
        try:
            load_weights(network, weights)
        except CSGError as error:
            raise CSGError(f'teacher: {self.checkpoint}: {str(error).removeprefix(f"{self.checkpoint}: ")}') from None
        if any(_is_channels_last(parameter) for parameter in student.parameters()):
            network.to(memory_format=torch.channels_last)
        return network


def _find_logits_layer(network: nn.Module) -> str:
    names = {name for name, _ in network.named_modules()}
    found = next((name for name in LOGITS_LAYERS if name in names), None)
    if found is None:
        raise CSGError(f'teacher: the model has none of {", ".join(LOGITS_LAYERS)}; set logits_layer')
    return found


def _is_channels_last(weight: Tensor) -> bool:
    return weight.ndim == 4 and not weight.is_contiguous() and weight.is_contiguous(memory_format=torch.channels_last)


def _scale(value: Any, factor: float) -> Any:
    return [each * factor for each in value] if isinstance(value, list) else value * factor
