"""Trained networks as ONNX files, compared with torch before they are left behind."""

import json
import os
from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from torch import Tensor, nn

from csg_seg.errors import CSGError
from csg_seg.files import write_whole
from csg_seg.version import __version__

from .inference import channel_order

# Of class scores, in float32; above it, a graph does not compute what the network does.
LIMIT = 1e-4
DTYPES = {'float32': torch.float32, 'float16': torch.float16}


class Scores(nn.Module):
    """A segmentor or classifier that takes and returns plain tensors."""

    def __init__(self, network: nn.Module, *, dtype: torch.dtype = torch.float32, labels: bool = False):
        """Wrap a network, changing its dtype in place.

        Args:
            network: of mmseg or mmpretrain.
            dtype: to compute in; scores are float32 nevertheless.
            labels: return the class of the highest score.
        """
        super().__init__()
        self.network = network.to(dtype)
        self.dtype = dtype
        self.labels = labels

    def forward(self, image: Tensor) -> Tensor:
        """Score the classes of each pixel, or of each image.

        Args:
            image: ``(batch, 3, height, width)``, normalised, float32.

        Returns:
            scores ``(batch, classes, height, width)`` or ``(batch, classes)``, float32; or labels, without
            the second dimension, int64.
        """
        image = image.to(self.dtype)
        if hasattr(self.network, 'encode_decode'):
            size = tuple(image.shape[2:])
            scores = self.network.encode_decode(image, [dict(img_shape=size, pad_shape=size)])
        else:
            scores = self.network(image, mode='tensor')
        return scores.argmax(dim=1) if self.labels else scores.float()


def export_onnx(
    network: nn.Module,
    out: str | os.PathLike,
    images: Sequence[Tensor],
    *,
    dtype: str = 'float32',
    labels: bool = False,
) -> dict[str, Any]:
    """Write an ONNX file, whose batch, height and width are free, after comparing it with torch.

    Args:
        network: of :func:`csg_seg.mm.inference.load_network`, plain or generated; a generated
            one's file holds codes and generators, and makes the weights as it runs.
        out: file to write.
        images: to compare on, each ``(batch, 3, height, width)``, normalised.
        dtype: 'float32' or 'float16', of weights and sums; input and scores are float32.
        labels: let the file give classes, not scores.

    Returns:
        JSON-ready: ``max_difference`` of class scores between onnxruntime and torch, both in float32
        unless ``dtype`` says otherwise; for labels, how far their scores are below the best.
        ``nodes`` and ``bytes`` of the file.

    Raises:
        CSGError: torch cannot export the network, the file computes something else, or labels are
            asked of a network that gives one score.
    """
    reference = Scores(network).eval()
    with torch.no_grad():
        wanted = [reference(image) for image in images]
    if labels and wanted[0].shape[1] == 1:
        raise CSGError('the network gives one score, which its threshold makes a label; export scores, not labels')
    scores = Scores(deepcopy(network), dtype=DTYPES[dtype], labels=labels).eval()
    model = _exported(scores, images[0])
    model.metadata_props.extend(_metadata(network))
    found: dict[str, Any] = {'dtype': dtype, 'nodes': len(model.graph.node)}

    def write(partial: Path) -> None:
        onnx.save(model, partial)
        found['bytes'] = partial.stat().st_size
        found['max_difference'] = max_difference(partial, images, wanted)
        if dtype == 'float32' and not found['max_difference'] <= LIMIT:
            raise CSGError(
                f'onnxruntime and torch differ by {found["max_difference"]:.2g}, more than {LIMIT}; no file left'
            )

    write_whole(Path(out), write)
    return found


def max_difference(path: str | os.PathLike, images: Sequence[Tensor], wanted: Sequence[Tensor]) -> float:
    """Compare an ONNX file's outputs with torch's class scores.

    Args:
        path: of the file.
        images: its inputs.
        wanted: class scores of each, ``(batch, classes, ...)``.

    Returns:
        The largest absolute difference; of a file that gives labels, how far their scores are below the best.
    """
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # not what it cannot fold into constants
    session = onnxruntime.InferenceSession(path, options, providers=['CPUExecutionProvider'])
    differences = []
    for image, scores in zip(images, wanted, strict=True):
        (got,) = session.run(None, {'image': image.numpy()})
        differences.append(_difference(torch.from_numpy(np.asarray(got)), scores))
    # Of which NaN is the largest.
    return torch.tensor(differences).max().item()


def _difference(got: Tensor, scores: Tensor) -> float:
    if got.is_floating_point():
        return (got - scores).abs().max().item()
    return (scores.max(dim=1).values - scores.gather(1, got[:, None])[:, 0]).max().item()


def _exported(scores: Scores, image: Tensor) -> onnx.ModelProto:
    # A batch of one would be taken for a constant.
    example = torch.cat([image[:1], image[:1]])
    free = dict.fromkeys((0, 2, 3), torch.export.Dim.DYNAMIC)
    try:
        with torch.no_grad():
            program = torch.onnx.export(
                scores,
                (example,),
                dynamo=True,
                dynamic_shapes={'image': free},
                input_names=['image'],
                output_names=['labels' if scores.labels else 'scores'],
                verbose=False,
            )
    except Exception as error:  # torch.export names what it does not follow
        first = str(error).strip().splitlines()[0][:200]
        raise CSGError(f'torch cannot export this network ({type(error).__name__}: {first})') from error
    return program.model_proto


def _metadata(network: nn.Module) -> list[onnx.StringStringEntryProto]:
    """Say how images are prepared and what the classes are."""
    preprocessor = network.data_preprocessor
    says: dict[str, Any] = {'csg_seg': __version__, 'channels': channel_order(network)}
    for key in ('mean', 'std'):
        if getattr(preprocessor, key, None) is not None:
            says[key] = getattr(preprocessor, key).flatten().tolist()
    for key, value in network.dataset_meta.items():
        if key in ('classes', 'palette') and value is not None:
            says[key] = value
    return [onnx.StringStringEntryProto(key=key, value=json.dumps(value)) for key, value in says.items()]
