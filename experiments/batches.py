"""Random batches, and the memory of a training step: for measurements without a data set."""

from typing import Any

import torch
from mmengine.structures import BaseDataElement, PixelData
from torch import Tensor, nn

from csg_seg.errors import CSGError


def random_batch(model: nn.Module, n: int, height: int, width: int, *, seed: int = 0) -> dict[str, Any]:
    """Return a batch for ``model(**batch, mode='loss')`` of a segmentor or classifier.

    Args:
        model: mmseg or mmpretrain model.
        n: number of images.
        height: height in pixels.
        width: width in pixels.
        seed: seed of images and labels.

    Raises:
        CSGError: the model has no head with a number of classes.
    """
    head = getattr(model, 'decode_head', getattr(model, 'head', None))
    head = head[-1] if isinstance(head, nn.ModuleList) else head
    classes = getattr(head, 'num_classes', None)
    if classes is None:
        raise CSGError(f'{type(model).__name__} has no head with num_classes; give a segmentor or a classifier')
    rng = torch.Generator().manual_seed(seed)
    device = next(model.parameters()).device
    images = torch.randn(n, 3, height, width, generator=rng).to(device)
    if hasattr(model, 'decode_head'):
        masks = torch.randint(classes, (n, 1, height, width), generator=rng).to(device)
        meta = dict(img_shape=(height, width), pad_shape=(height, width), ori_shape=(height, width))
        samples = [BaseDataElement(metainfo=meta, gt_sem_seg=PixelData(data=mask)) for mask in masks]
    else:
        labels = torch.randint(classes, (n, 1), generator=rng).to(device)
        samples = [BaseDataElement(gt_label=label) for label in labels]
    return dict(inputs=images, data_samples=samples)


def held_bytes(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, int]:
    """Return the bytes of parameters, gradients and optimizer state after a step."""
    parameters = list(model.parameters())
    states = [each for state in optimizer.state.values() for each in state.values()]
    return {
        'parameter_bytes': sum(each.nbytes for each in parameters),
        'gradient_bytes': sum(each.grad.nbytes for each in parameters if each.grad is not None),
        'optimizer_bytes': sum(each.nbytes for each in states if isinstance(each, Tensor)),
    }
