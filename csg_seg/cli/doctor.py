"""Look at the installation: versions, the mm packages' line, devices, what does not go together and what to do."""

import platform
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from csg_seg.version import __version__

from .errors import EXTRAS, ONNX_PACKAGES

# Import name, its distribution of the maintained line, and OpenMMLab's.
MM = (
    ('mmengine', 'onedl-mmengine', 'mmengine'),
    ('mmcv', 'onedl-mmcv', 'mmcv'),
    ('mmseg', 'onedl-mmsegmentation', 'mmsegmentation'),
    ('mmpretrain', 'onedl-mmpretrain', 'mmpretrain'),
)
REQUIRED = ('torchvision', 'numpy', 'pillow', 'pycocotools', 'safetensors')
OPTIONAL = (*ONNX_PACKAGES, 'timm')


@dataclass(frozen=True)
class Finding:
    """One line of the report.

    Attributes:
        name: what was looked at.
        state: its version, or what was found.
        remedy: what to do about it; empty if nothing is wrong.
    """

    name: str
    state: str
    remedy: str = ''


def examine() -> list[Finding]:
    """Return what is installed, and what is wrong with it."""
    return [*_basics(), *_mm_packages(), *_extras(), *_devices()]


def _basics() -> Iterator[Finding]:
    yield Finding('csg_seg', __version__)
    found = sys.version_info[:2]
    wrong = '' if (3, 10) <= found <= (3, 12) else 'use Python 3.10 to 3.12'
    yield Finding('python', platform.python_version(), wrong)
    number = tuple(int(part) for part in torch.__version__.split('.')[:2])
    yield Finding('torch', torch.__version__, '' if number >= (2, 6) else "pip install 'torch>=2.6'")
    for name in REQUIRED:
        yield from _package(name, remedy=f'pip install {name}')
    if _installed('torchvision'):
        yield from _importing('torchvision', 'install the torchvision that was built for this torch')


def _mm_packages() -> Iterator[Finding]:
    lines = set()
    for module, maintained, original in MM:
        both = {name: found for name in (maintained, original) if (found := _installed(name))}
        lines |= {'maintained' if name == maintained else "OpenMMLab's" for name in both}
        if not both:
            yield Finding(module, 'not installed', "for configs and tools: pip install '.[mm]' in csg_seg's folder")
        elif len(both) == 2:
            remedy = f'both install {module} and overwrite each other: pip uninstall both, then install one'
            yield Finding(module, ' and '.join(f'{name} {found}' for name, found in both.items()), remedy)
        else:
            ((name, found),) = both.items()
            yield Finding(module, f'{found} ({name})')
            yield from _importing(module, f'pip install a {name} that goes with the others; see the README')
    if len(lines) == 2:
        yield Finding('mm packages', 'of two lines', "take all from one line, onedl-* or OpenMMLab's")


def _extras() -> Iterator[Finding]:
    for name in OPTIONAL:
        extra = f"'.[{EXTRAS[name]}]' in csg_seg's folder" if name in EXTRAS else name
        yield Finding(name, _installed(name) or f'not installed; optional: pip install {extra}')


def _devices() -> Iterator[Finding]:
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            yield Finding(f'GPU {index}', torch.cuda.get_device_name(index))
    else:
        yield Finding('GPU', f'none; runs on the CPU, {torch.get_num_threads()} threads')


def _package(name: str, *, remedy: str) -> Iterator[Finding]:
    found = _installed(name)
    yield Finding(name, found or 'not installed', '' if found else remedy)


def _importing(module: str, remedy: str) -> Iterator[Finding]:
    """Yield a finding only if a module that is installed does not import."""
    try:
        import_module(module)
    except Exception as error:  # whatever stops it is what the user has to know
        yield Finding(module, f'does not import ({type(error).__name__}: {_first_line(error)})', remedy)


def _first_line(error: Any) -> str:
    return (str(error).strip().splitlines() or [''])[0][:120]


def _installed(distribution: str) -> str | None:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None
