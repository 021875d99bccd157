"""Export a trained network to ONNX and compare the file with torch."""

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
from mmengine.model import BaseModel
from torch import Tensor, nn

from csg_seg.errors import CSGError
from csg_seg.files import write_whole
from csg_seg.version import __version__

from .inference import channel_order

# Largest accepted difference of class scores in float32.
LIMIT = 1e-4
DTYPES = {'float32': torch.float32, 'float16': torch.float16}


class Scores(nn.Module):
    """A segmentor or classifier that takes and returns plain tensors.

    Args:
        network: a network of mmseg or mmpretrain; its dtype is changed in place.
        dtype: dtype to compute in. Scores are returned in float32.
        labels: return the class with the highest score.
    """

    def __init__(self, network: BaseModel, *, dtype: torch.dtype = torch.float32, labels: bool = False):
        super().__init__()
        self.network: BaseModel = network.to(dtype)
        self.dtype = dtype
        self.labels = labels

    def forward(self, image: Tensor) -> Tensor:
        """Return the class scores of each pixel or image.

        Args:
            image: normalised float32 images ``(batch, 3, height, width)``.

        Returns:
            float32 scores ``(batch, classes, height, width)`` or ``(batch, classes)``, or int64 labels
            without the second dimension.
        """
        image = image.to(self.dtype)
        if hasattr(self.network, 'encode_decode'):
            size = tuple(image.shape[2:])
            scores = self.network.encode_decode(image, [dict(img_shape=size, pad_shape=size)])
        else:
            scores = self.network(image, mode='tensor')
        return scores.argmax(dim=1) if self.labels else scores.float()


def export_onnx(
    network: BaseModel,
    out: str | os.PathLike,
    images: Sequence[Tensor],
    *,
    dtype: str = 'float32',
    labels: bool = False,
) -> dict[str, Any]:
    """Write an ONNX file with any batch size, height and width, and compare it with torch.

    Args:
        network: a network from :func:`csg_seg.deploy.inference.load_network`. If it is a CSG
            network, the file contains codes and generators, and generates the weights when it runs.
        out: the file to write.
        images: normalised images ``(batch, 3, height, width)`` to compare on.
        dtype: 'float32' or 'float16', the dtype of weights and sums; input and scores are float32.
        labels: write a file that returns classes instead of scores.

    Returns:
        ``max_difference`` (see :func:`max_difference`) to the float32 scores of torch, ``dtype``, and
        ``nodes`` and ``bytes`` of the file. They can be written as JSON.

    Raises:
        CSGError: torch cannot export the network, the file computes something else, or ``labels``
            is set for a network with one score.
    """
    reference = Scores(network).eval()
    with torch.no_grad():
        wanted = [reference(image) for image in images]
    if labels and wanted[0].shape[1] == 1:
        raise CSGError('the network has one score and a threshold; export scores, not labels')
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
                f'onnxruntime and torch differ by {found["max_difference"]:.2g}, more than {LIMIT}; no file was written'
            )

    write_whole(Path(out), write)
    return found


def max_difference(path: str | os.PathLike, images: Sequence[Tensor], wanted: Sequence[Tensor]) -> float:
    """Compare an ONNX file's outputs with torch's class scores.

    Args:
        path: the file.
        images: inputs of the file.
        wanted: class scores ``(batch, classes, ...)`` of torch for each input.

    Returns:
        The largest absolute difference. For a file that returns labels: how far the scores of its labels
        are below the highest scores, at most.
    """
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # hide warnings about constants that cannot be folded
    session = onnxruntime.InferenceSession(path, options, providers=['CPUExecutionProvider'])
    differences = []
    for image, scores in zip(images, wanted, strict=True):
        (got,) = session.run(None, {'image': image.numpy()})
        differences.append(_difference(torch.from_numpy(np.asarray(got)), scores))
    return torch.tensor(differences).max().item()  # max() returns NaN if there is one


def _difference(got: Tensor, scores: Tensor) -> float:
    if got.is_floating_point():
        return (got - scores).abs().max().item()
    return (scores.max(dim=1).values - scores.gather(1, got[:, None])[:, 0]).max().item()


def _exported(scores: Scores, image: Tensor) -> onnx.ModelProto:
    # torch would treat a batch of one as a constant.
    example = torch.cat([image[:1], image[:1]])
    dynamic = dict.fromkeys((0, 2, 3), torch.export.Dim.DYNAMIC)
    try:
        with torch.no_grad():
            program = torch.onnx.export(
                scores,
                (example,),
                dynamo=True,
                dynamic_shapes={'image': dynamic},
                input_names=['image'],
                output_names=['labels' if scores.labels else 'scores'],
                verbose=False,
            )
    except Exception as error:  # torch.export may raise anything for code that it does not support
        first = str(error).strip().splitlines()[0][:200]
        raise CSGError(f'torch cannot export this network ({type(error).__name__}: {first})') from error
    assert program is not None
    model = program.model_proto
    # The exporter notes for each node where this machine's code made it: a quarter of a small network's file.
    for part in (*model.graph.node, *model.graph.value_info, *model.graph.input, *model.graph.output):
        part.ClearField('metadata_props')
    return model


def _metadata(network: BaseModel) -> list[onnx.StringStringEntryProto]:
    """Return the normalisation and padding of images and the classes, to store in the file."""
    preprocessor = network.data_preprocessor
    metadata: dict[str, Any] = {'csg_seg': __version__, 'channels': channel_order(network)}
    for key in ('mean', 'std'):
        if getattr(preprocessor, key, None) is not None:
            metadata[key] = getattr(preprocessor, key).flatten().tolist()
    padding = {key: value for key, value in (getattr(preprocessor, 'test_cfg', None) or {}).items() if value}
    if padding:
        metadata['padding'] = {**padding, 'value': preprocessor.pad_val}
    for key, value in network.dataset_meta.items():
        if key in ('classes', 'palette') and value is not None:
            metadata[key] = value
    return [onnx.StringStringEntryProto(key=key, value=json.dumps(value)) for key, value in metadata.items()]
