"""Structured pruning with Torch-Pruning: ``model=dict(type='PrunedModel', dense='dense.pth', params=1371702, ...)``."""

from copy import deepcopy
from functools import partial
from typing import Any

import torch
from mmengine.logging import print_log
from mmengine.registry import MODELS
from torch import Tensor, nn

from csg_seg.errors import CSGError
from csg_seg.mm.checkpoints.reading import load_weights, read_checkpoint

try:
    import torch_pruning
except ImportError:
    raise CSGError("structured pruning needs torch-pruning; install the extra: pip install -e '.[dev]'") from None

OUTPUTS = ('conv_seg', 'fc')  # the layers whose channels are the classes


@MODELS.register_module()
def PrunedModel(base_type: str, dense: str, params: int, **base: Any) -> nn.Module:
    """Build the model of the base config with fewer channels, which training starts from a pruned dense network.

    Fang et al., "DepGraph: Towards Any Structural Pruning", CVPR 2023. All layers lose the same fraction of their
    channels, those whose group of coupled filters has the smallest L2 norm: the settings that the library's README
    starts from. It warns that ranking channels across layers can prune some of them too far. With the same fraction
    everywhere, the shapes do not depend on weights, so only the start of a training needs the dense checkpoint.

    Args:
        base_type: registered name of the model to build.
        dense: checkpoint of the trained dense network, read when a training begins.
        params: number of parameters of the pruned model, met within 3 %.
        base: arguments of ``base_type``.

    Raises:
        CSGError: no pruning gives the wanted size.
    """
    # Segmentors write into their config.
    architecture = deepcopy(dict(type=base_type, **base))
    model = MODELS.build(dict(type=base_type, **base))
    ratio = _choose_ratio(model, params)
    prune(model, ratio, importance=_equal)
    # mmengine calls it before it loads checkpoints.
    model.__dict__['init_weights'] = partial(start_from, model, architecture, dense, ratio)
    return model


def start_from(model: nn.Module, architecture: dict[str, Any], dense: str, ratio: float) -> None:
    """Load the weights of a dense network that is pruned by the same ratio as a model.

    Args:
        model: the pruned model.
        architecture: config of the dense network.
        dense: checkpoint of the dense network.
        ratio: fraction of channels that were removed from the model.

    Raises:
        FileNotFoundError: there is no such checkpoint.
        CSGError: the checkpoint is damaged, or is one of another network.
    """
    source = MODELS.build(deepcopy(architecture))
    try:
        load_weights(source, read_checkpoint(dense)['state_dict'])
    except CSGError as error:
        raise CSGError(f'dense: {dense}: {str(error).removeprefix(f"{dense}: ")}') from None
    prune(source, ratio)
    model.load_state_dict(source.state_dict())
    print_log(f'PrunedModel: removed {ratio:.1%} of the channels of {dense}', logger='current')


def prune(model: nn.Module, ratio: float, importance: Any = None) -> None:
    """Remove the same fraction of channels from each layer of an mmseg or mmpretrain model, in place.

    Args:
        model: its classes are kept.
        ratio: fraction of channels to remove.
        importance: scores the channels of a group of layers; by default the L2 norm of their filters.
    """
    was_training = model.training
    model.eval()  # BatchNorm after global pooling cannot train on one image
    torch_pruning.pruner.BasePruner(
        model,
        torch.zeros(1, 3, 64, 64),
        importance=importance or torch_pruning.importance.GroupMagnitudeImportance(p=2),
        pruning_ratio=ratio,
        ignored_layers=[each for name, each in model.named_modules() if name.rpartition('.')[2] in OUTPUTS],
        forward_fn=_run_heads,
    ).step()
    model.zero_grad()
    model.train(was_training)


def _run_heads(model: Any, images: Tensor) -> list[Any]:
    """Return the outputs of all heads, auxiliary ones included, from one run of the backbone."""
    features = model.extract_feat(images)
    heads = [each for name, each in model.named_children() if name.endswith('head')]
    flat = [head for each in heads for head in (each if isinstance(each, nn.ModuleList) else [each])]
    return [head(features) for head in flat]


def _equal(group: Any) -> Tensor:
    """Score all channels of a group alike."""
    return torch.ones(len(group[0].idxs))


def _choose_ratio(model: nn.Module, params: int) -> float:
    """Return the fraction of channels whose removal brings a model closest to a size.

    Raises:
        CSGError: the closest size is more than 3 % off.
    """
    sizes: dict[float, int] = {0.0: _count(model)}
    low, high = 0.0, 1.0
    for _ in range(10):  # bisection: fewer channels remain in steps
        middle = (low + high) / 2
        pruned = deepcopy(model)
        prune(pruned, middle, importance=_equal)
        sizes[middle] = _count(pruned)
        low, high = (middle, high) if sizes[middle] > params else (low, middle)
    best = min(sizes, key=lambda ratio: abs(sizes[ratio] - params))
    if abs(sizes[best] - params) > 0.03 * params:
        raise CSGError(
            f'PrunedModel: no pruning gives {params:,} parameters within 3 %, the closest is {sizes[best]:,}; '
            'change params'
        )
    return best


def _count(model: nn.Module) -> int:
    return sum(each.numel() for each in model.parameters())
