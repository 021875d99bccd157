"""The checksum of a compact checkpoint."""

import hashlib
import json
from collections.abc import Mapping

import torch
from torch import Tensor


def digest(tensors: Mapping[str, Tensor], header: Mapping[str, str]) -> str:
    """Return the SHA-256 of tensors and metadata."""
    sha = hashlib.sha256(json.dumps(dict(sorted(header.items()))).encode())
    for name in sorted(tensors):
        sha.update(f'{name} {tensors[name].dtype} {tuple(tensors[name].shape)}'.encode())
        sha.update(tensors[name].reshape(-1).view(torch.uint8).numpy().data)
    return sha.hexdigest()
