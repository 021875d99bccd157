"""Score ONNX files in the place of the networks that they were made from."""

from pathlib import Path
from typing import Any

import onnxruntime
import torch
from torch import Tensor


def open_session(file: Path, *, threads: int = 1) -> onnxruntime.InferenceSession:
    """Return a session that computes on the CPU."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3  # hide warnings about constants that cannot be folded
    return onnxruntime.InferenceSession(file, options, providers=['CPUExecutionProvider'])


def predict_with(session: onnxruntime.InferenceSession, network: Any) -> None:
    """Let a segmentor of mmseg predict what an ONNX file of class scores does, with its own resizing of images."""

    def encode_decode(image: Tensor, metas: object) -> Tensor:
        (scores,) = session.run(None, {'image': image.numpy()})
        return torch.from_numpy(scores)

    network.encode_decode = encode_decode
