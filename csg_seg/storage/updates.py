"""Updates: what differs between two compact checkpoints, such as one network trained for several customers."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from csg_seg.errors import CSGError

from .digest import digest

# Of a file, in bytes, in most file systems.
LONGEST_NAME = 255


@dataclass(frozen=True)
class Content:
    """The tensors and metadata of a compact checkpoint, as they are in its file.

    Attributes:
        tensors: in the file's precision.
        header: text by name, without format, version and checksum.
        sha256: the checksum of the file; for an update, of tensors and header together with its base.
        name: of the file.
    """

    tensors: dict[str, Tensor]
    header: dict[str, str]
    sha256: str
    name: str


@dataclass(frozen=True)
class Update:
    """What an update file says beside its tensors.

    Attributes:
        base: checksum of the base.
        base_name: file name of the base.
        header: metadata that the base lacks or has differently.
        removed: names of tensors, and keys of the metadata, that only the base has.
        result: checksum of tensors and metadata after the update.
    """

    base: str
    base_name: str
    header: dict[str, str]
    removed: tuple[list[str], list[str]]
    result: str

    def to_header(self) -> dict[str, str]:
        """Return the metadata of the file."""
        return {
            'base': self.base,
            'base_name': self.base_name,
            'header': json.dumps(self.header),
            'removed': json.dumps(self.removed),
            'result': self.result,
        }

    @classmethod
    def from_header(cls, header: Mapping[str, str]) -> 'Update':
        """Read the metadata of a file.

        Raises:
            LookupError, TypeError, ValueError: another program wrote it.
        """
        told, removed = json.loads(header['header']), json.loads(header['removed'])
        texts = [each for pair in told.items() for each in pair] + [each for names in removed for each in names]
        name = Path(header['base_name']).name  # a base is not read from other folders
        if (
            not 0 < len(name.encode()) <= LONGEST_NAME
            or len(removed) != 2
            or not all(isinstance(each, str) for each in texts)
        ):
            raise TypeError('header')
        return cls(header['base'], name, told, removed, header['result'])


def find_difference(
    tensors: Mapping[str, Tensor], header: Mapping[str, str], base: Content
) -> tuple[dict[str, Tensor], Update]:
    """Return the tensors that differ from a base's, and the rest of the update.

    Args:
        tensors: after the update, in the file's precision.
        header: metadata after the update.
        base: what is there before.
    """
    changed = {name: each for name, each in tensors.items() if not _equal(each, base.tensors.get(name))}
    told = {key: text for key, text in header.items() if base.header.get(key) != text}
    lost = [name for name in base.tensors if name not in tensors], [key for key in base.header if key not in header]
    return changed, Update(base.sha256, base.name, told, lost, digest(tensors, header))


def apply_update(tensors: Mapping[str, Tensor], update: Update, base: Content) -> Content:
    """Return the content that an update makes of its base.

    Raises:
        CSGError: it is another base, or the result is not what was saved.
    """
    if base.sha256 != update.base:
        raise CSGError(f'it has checksum {base.sha256[:12]}; take the file that the update was made from')
    lost_tensors, lost_keys = update.removed
    kept = {name: each for name, each in base.tensors.items() if name not in lost_tensors}
    header = {key: text for key, text in base.header.items() if key not in lost_keys} | update.header
    merged = {**kept, **tensors}
    if digest(merged, header) != update.result:
        raise CSGError('together they are not the network that was saved; copy both again')
    return Content(merged, header, update.result, base.name)


def _equal(one: Tensor, other: Tensor | None) -> bool:
    """Whether two tensors have the same bytes."""
    if other is None or one.dtype != other.dtype or one.shape != other.shape:
        return False
    return torch.equal(*(each.contiguous().reshape(-1).view(torch.uint8) for each in (one, other)))
