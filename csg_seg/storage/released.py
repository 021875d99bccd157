"""Read released CIFAR-10 checkpoints: those of the method's authors, and dense ResNets.

Network and settings are recognised from the tensors. The authors' generator is named ``CSG.weight`` or ``CLG.weight``,
is repeated in each block, and may have a ``module.`` prefix. Their code assembles slices in the 'flat' layout.
"""

import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from csg_seg.errors import CSGError

GENERATOR = re.compile(r'(?:.*\.)?C[SL]G\.weight')
# Pixel statistics of ImageNet, from 0 to 255: the released dense CIFAR ResNets were trained with them.
IMAGENET = dict(mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375])

# Network name, backbone config and number of features.
Description = tuple[str, dict[str, Any], int]


@dataclass(frozen=True)
class Released:
    """A released checkpoint, converted.

    Attributes:
        network: its usual name.
        backbone: registered type and arguments.
        features: number of channels that the classifier takes.
        classes: number of classes.
        csg: settings of the generator without ``include``, or None for a dense network.
        generated: names of the generated convs.
        tensors: state dict of an image classifier with this backbone, in float32.
        normalisation: mean and std of the training pixels, or None for those of CIFAR-10.
        accuracy: in percent, or None if the file holds none.
    """

    network: str
    backbone: dict[str, Any]
    features: int
    classes: int
    csg: dict[str, Any] | None
    generated: tuple[str, ...]
    tensors: dict[str, Tensor]
    normalisation: dict[str, list[float]] | None
    accuracy: float | None


@dataclass(frozen=True)
class Family:
    """Networks with one architecture and one naming scheme.

    Attributes:
        signature: name of a tensor that only these networks have.
        rules: pattern of a layer's name in the file, and its name here, with the pattern's groups as integers.
        kernel: kernel size of the generated convs.
        describe: maps all tensors to network, backbone and features of :class:`Released`.
        classifier: name of the classifier in the file.
        normalisation: see :class:`Released`.
    """

    signature: str
    rules: tuple[tuple[str, str], ...]
    kernel: int
    describe: Callable[[Mapping[str, Tensor]], Description]
    classifier: str = 'linear'
    normalisation: dict[str, list[float]] | None = None


def read_released(checkpoint: Any) -> Released:
    """Recognise the network in the content of a released file.

    Args:
        checkpoint: a state dict, or a dict with one as ``net`` or ``state_dict`` and an accuracy as ``acc`` or
            ``best_prec1``.

    Raises:
        CSGError: the network is not known here, or the file is damaged.
    """
    tensors, accuracy = _unpack(checkpoint)
    generator = _take_generator(tensors)
    family = next((each for each in FAMILIES if {each.signature, f'{each.classifier}.weight'} <= tensors.keys()), None)
    if family is None:
        raise CSGError(
            f'no network known here: {_describe(tensors)}; known are the CIFAR ResNet, DenseNet-BC, MobileNetV2 and '
            "ShuffleNetV2 of the method's authors, and dense ResNets of the akamaster kind"
        )
    try:
        classes = tensors[f'{family.classifier}.weight'].shape[0]
        network, backbone, features = family.describe(tensors)
    except CSGError:
        raise
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise CSGError(f'a damaged network with {family.signature}: {error}') from None
    tensors = _fill_counters(tensors)
    renamed = {_rename(name, family): tensor for name, tensor in tensors.items()}
    if backbone['type'] == 'CIFARDenseNet':
        renamed = _reorder_dense(renamed, growth=backbone['growth_rate'])
    generated = tuple(name.removesuffix('.code') for name in renamed if name.endswith('.code'))
    csg = None
    if generator is not None:
        csg = _settings(generator, family.kernel, [renamed[f'{name}.code'] for name in generated])
        renamed['csg.0.weight'] = generator.t().contiguous()
    elif generated:
        raise CSGError(f'{network}: there are codes ({generated[0]}) but no generator, CSG.weight or CLG.weight')
    return Released(network, backbone, features, classes, csg, generated, renamed, family.normalisation, accuracy)


def _unpack(checkpoint: Any) -> tuple[dict[str, Tensor], float | None]:
    """Return the tensors in float32, without prefixes and with codes named after their convs, and the accuracy."""
    if not isinstance(checkpoint, Mapping):
        raise CSGError(f'holds a {type(checkpoint).__name__}, not a dict of tensors')
    stored = next((checkpoint[key] for key in ('net', 'state_dict') if key in checkpoint), checkpoint)
    if not isinstance(stored, Mapping):
        raise CSGError(f'holds a {type(stored).__name__} for a state dict')
    others = [name for name, tensor in stored.items() if not (isinstance(name, str) and isinstance(tensor, Tensor))]
    if others or not stored:
        raise CSGError(f'holds no state dict: {f"{others[0]} is not a tensor" if others else "it is empty"}')
    tensors = {}
    for name, tensor in stored.items():
        name = re.sub(r'^(module\.)+', '', name)
        name = re.sub(r'(^|\.)code([0-9]?)$', lambda found: f'{found[1]}conv{found[2] or 1}.code', name)
        tensors[name] = tensor.float() if tensor.is_floating_point() else tensor
    accuracy = next((checkpoint[key] for key in ('acc', 'best_prec1') if key in checkpoint), None)
    if isinstance(accuracy, Tensor) and accuracy.numel() == 1:
        accuracy = accuracy.item()
    return tensors, float(accuracy) if isinstance(accuracy, (int, float)) else None


def _take_generator(tensors: dict[str, Tensor]) -> Tensor | None:
    """Remove all copies of the generator ``(prod(slice_shape), code_dim)`` from the tensors, and return it."""
    for name, tensor in tensors.items():
        if (GENERATOR.fullmatch(name) or name.endswith('.code')) and (tensor.ndim != 2 or tensor.numel() == 0):
            raise CSGError(f'{name} is {tuple(tensor.shape)}; generators and codes are matrices')
    names = [name for name in tensors if GENERATOR.fullmatch(name)]
    copies = [tensors.pop(name) for name in names]
    for name, copy in zip(names, copies, strict=True):
        # Copies with NaN count as equal; NaN is refused later, with a better message.
        if copy.shape != copies[0].shape or not torch.allclose(copy, copies[0], rtol=0, atol=0, equal_nan=True):
            raise CSGError(f'{name} differs from {names[0]}; one generator for all layers was expected')
    return copies[0] if copies else None


def _settings(generator: Tensor, kernel: int, codes: Iterable[Tensor]) -> dict[str, Any]:
    size, code_dim = generator.shape
    side = math.isqrt(size // kernel**2)
    if side**2 * kernel**2 != size:
        raise CSGError(f'the generator is {tuple(generator.shape)}; {size} is not a square slice of {kernel}x{kernel}')
    wrong = next((len(code[0]) for code in codes if code.shape[1] != code_dim), None)
    if wrong is not None:
        raise CSGError(f'codes of length {wrong} do not fit a generator for codes of length {code_dim}')
    binary = bool((generator.abs() == generator.abs().max()).all())
    frozen = dict(freeze_generator=True) if binary else {}
    return dict(slice_shape=(side, side, kernel, kernel), code_dim=code_dim, layout='flat', **frozen)


def _rename(name: str, family: Family) -> str:
    layer, _, entry = name.rpartition('.')
    if layer == family.classifier:
        return f'head.fc.{entry}'
    for pattern, place in family.rules:
        found = re.fullmatch(pattern, layer)
        if found:
            return f'backbone.{place.format(*(int(group) for group in found.groups()))}.{entry}'
    raise CSGError(f'{name} is not a layer of the network that {family.signature} belongs to')


def _fill_counters(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Add the batch counters that files from old PyTorch versions lack."""
    norms = [name.removesuffix('running_mean') for name in tensors if name.endswith('running_mean')]
    return {f'{norm}num_batches_tracked': torch.tensor(0) for norm in norms} | dict(tensors)


def _reorder_dense(tensors: Mapping[str, Tensor], *, growth: int) -> dict[str, Tensor]:
    """Reorder the input channels of a DenseNet: the authors concatenate the newest first, mmpretrain the oldest.

    After ``i`` bottlenecks of a block, a layer of the authors takes ``i`` groups of ``growth`` channels, then the
    block's input.
    """
    reordered = dict(tensors)
    for name, tensor in tensors.items():
        found = re.fullmatch(r'backbone\.(stages|transitions)\.(\d)(?:\.block\.(\d+))?\.(\w+)\.(\w+)', name)
        if name == 'head.fc.weight':
            stage, bottlenecks = 2, _blocks(tensors, r'backbone\.stages\.2\.block\.(\d+)\.')
        elif found and found[4] in ('norm1', 'norm', '0', 'conv') or (found and found[3] and found[4] == 'conv1'):
            stage = int(found[2])
            bottlenecks = int(found[3]) if found[3] else _blocks(tensors, rf'backbone\.stages\.{stage}\.block\.(\d+)\.')
        else:
            continue
        if tensor.ndim == 0:
            continue
        axis = 0 if tensor.ndim == 1 else 1
        news = tensor.narrow(axis, 0, bottlenecks * growth).split(growth, dim=axis) if bottlenecks else ()
        first = tensor.narrow(axis, bottlenecks * growth, tensor.shape[axis] - bottlenecks * growth)
        reordered[name] = torch.cat([first, *reversed(news)], dim=axis)
    return reordered


def _blocks(tensors: Iterable[str], pattern: str) -> int:
    """Count the blocks that are numbered in the names."""
    return 1 + max(int(found[1]) for name in tensors if (found := re.match(pattern, name)))


def _describe(tensors: Mapping[str, Tensor]) -> str:
    shown = ', '.join(f'{name} {tuple(tensor.shape)}' for name, tensor in list(tensors.items())[:3])
    return f'{len(tensors)} tensors, {shown}' + (' ...' if len(tensors) > 3 else '')


def _describe_resnet(zeros: str, stage: str) -> Callable[[Mapping[str, Tensor]], Description]:
    def describe(tensors: Mapping[str, Tensor]) -> Description:
        depth = 6 * _blocks(tensors, rf'{stage}1\.(\d+)\.') + 2
        return f'ResNet-{depth}', dict(type='CIFARResNet', depth=depth, zeros=zeros), 64

    return describe


def _describe_densenet(tensors: Mapping[str, Tensor]) -> Description:
    growth = len(tensors['conv1.weight']) // 2
    depth = 6 * _blocks(tensors, r'dense1\.(\d+)\.') + 4
    backbone = dict(type='CIFARDenseNet', depth=depth, growth_rate=growth)
    return f'DenseNet-BC {depth}-{growth}', backbone, tensors['linear.weight'].shape[1]


def _describe_shufflenet(tensors: Mapping[str, Tensor]) -> Description:
    widths = {48: 0.5, 116: 1.0, 176: 1.5}
    channels = 2 * len(tensors['layer1.0.bn5.weight'])
    if channels not in widths:
        raise CSGError(f'a ShuffleNetV2 of {channels} channels in its first stage; known are {list(widths)}')
    width = widths[channels]
    return f'ShuffleNetV2 {width}x', dict(type='CIFARShuffleNetV2', widen_factor=width), 1024


def _shufflenet_rules() -> Iterable[tuple[str, str]]:
    """Yield the rules for mmpretrain's names: stages count from 0, and each conv is next to its norm."""
    down = ('branch1.0', 'branch1.1', 'branch2.0', 'branch2.1', 'branch2.2')
    basic = ('branch2.0', 'branch2.1', 'branch2.2')
    for kind in ('conv', 'bn'):
        yield f'{kind}1', f'conv1.{kind}'
        yield f'{kind}2', f'layers.3.{kind}'
        for stage in range(3):
            for number, place in enumerate(down, start=1):
                yield rf'layer{stage + 1}\.0\.{kind}{number}', f'layers.{stage}.0.{place}.{kind}'
            for number, place in enumerate(basic, start=1):
                yield rf'layer{stage + 1}\.([1-9]\d*)\.{kind}{number}', f'layers.{stage}.{{0}}.{place}.{kind}'


def _densenet_rules() -> Iterable[tuple[str, str]]:
    yield 'conv1', 'stem'
    for stage in range(3):
        for theirs, ours in (('bn1', 'norm1'), ('conv1', 'conv1'), ('bn2', 'norm2'), ('conv2', 'conv2')):
            yield rf'dense{stage + 1}\.(\d+)\.{theirs}', f'stages.{stage}.block.{{0}}.{ours}'
        yield rf'trans{stage + 1}\.bn', f'transitions.{stage}.{"norm" if stage < 2 else "0"}'
        yield rf'trans{stage + 1}\.conv', f'transitions.{stage}.conv'


FAMILIES = (
    Family(
        signature='stage_1.0.bn_a.weight',
        rules=(
            (r'conv_1_3x3', 'conv1'),
            (r'bn_1', 'bn1'),
            (r'stage_(\d)\.(\d+)\.(?:conv_a|conv1)', 'layer{0}.{1}.conv1'),
            (r'stage_(\d)\.(\d+)\.(?:conv_b|conv2)', 'layer{0}.{1}.conv2'),
            (r'stage_(\d)\.(\d+)\.bn_a', 'layer{0}.{1}.bn1'),
            (r'stage_(\d)\.(\d+)\.bn_b', 'layer{0}.{1}.bn2'),
        ),
        kernel=3,
        describe=_describe_resnet('after', 'stage_'),
        classifier='classifier',
    ),
    Family(signature='dense1.0.bn1.weight', rules=tuple(_densenet_rules()), kernel=3, describe=_describe_densenet),
    Family(
        signature='layers.0.bn3.weight',
        rules=(
            (r'conv([12])', 'conv{0}'),
            (r'bn([12])', 'bn{0}'),
            (r'layers\.(\d+)\.conv([123])', 'layers.{0}.conv{1}'),
            (r'layers\.(\d+)\.bn([123])', 'layers.{0}.bn{1}'),
            (r'layers\.(\d+)\.shortcut\.([01])', 'layers.{0}.shortcut.{1}'),
        ),
        kernel=1,
        describe=lambda _: ('MobileNetV2', dict(type='CIFARMobileNetV2'), 1280),
    ),
    Family(signature='layer1.0.bn5.weight', rules=tuple(_shufflenet_rules()), kernel=1, describe=_describe_shufflenet),
    # Last, because its signature is part of the one before.
    Family(
        signature='layer1.0.bn2.weight',
        rules=(
            (r'conv1', 'conv1'),
            (r'bn1', 'bn1'),
            (r'layer(\d)\.(\d+)\.conv([12])', 'layer{0}.{1}.conv{2}'),
            (r'layer(\d)\.(\d+)\.bn([12])', 'layer{0}.{1}.bn{2}'),
        ),
        kernel=3,
        describe=_describe_resnet('around', 'layer'),
        normalisation=IMAGENET,
    ),
)
