"""Examine the installation: versions, devices, incompatible packages, and what to do about them."""

import platform
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from csg_seg.version import __version__

from .failures import EXTRAS

# Oldest and newest version that tests were run with (docs/supported.md says which); setup.py and README.md agree.
PYTHON = ((3, 10), (3, 14))
TORCH = ((2, 6), (2, 15))
# Import name, the distribution that we install, and the distribution of OpenMMLab.
MM = (
    ('mmengine', 'onedl-mmengine', 'mmengine'),
    ('mmcv', 'onedl-mmcv', 'mmcv'),
    ('mmseg', 'onedl-mmsegmentation', 'mmsegmentation'),
    ('mmpretrain', 'onedl-mmpretrain', 'mmpretrain'),
)
REQUIRED = ('numpy', 'safetensors')
# Distribution, its import name, and what it is for.
OPTIONAL = (
    ('torchvision', 'torchvision', 'its networks by name, and the mm packages'),
    ('pillow', 'PIL', 'data sets: draw_voc and coco2voc'),
    ('pycocotools', 'pycocotools', 'coco2voc'),
    ('rich', 'rich', 'tables and progress bars of the tools'),
    ('matplotlib', 'matplotlib', 'figures'),
    ('onnx', 'onnx', 'export_onnx'),
    ('onnxruntime', 'onnxruntime', 'export_onnx'),
    ('onnxscript', 'onnxscript', 'export_onnx'),
    ('timm', 'timm', 'its networks by name'),
    ('segmentation-models-pytorch', 'segmentation_models_pytorch', 'its networks by name'),
    ('monai', 'monai', 'its networks by name'),
    ('transformers', 'transformers', 'its networks by name'),
)


@dataclass(frozen=True)
class Finding:
    """One line of the report.

    Attributes:
        name: the package or device.
        state: its version, or what is wrong with it.
        remedy: what to do; empty if nothing is wrong.
    """

    name: str
    state: str
    remedy: str = ''


def examine() -> list[Finding]:
    """Return the findings on all packages and devices."""
    return [*_basics(), *_mm_packages(), *_optional_packages(), *_devices()]


def _basics() -> Iterator[Finding]:
    yield Finding('csg_seg', __version__)
    yield _in_range('python', platform.python_version(), PYTHON)
    yield _in_range('torch', torch.__version__, TORCH)
    yield Finding('tested with', f'python {_span(PYTHON)}, torch {_span(TORCH)}; see docs/supported.md')
    for name in REQUIRED:
        installed = _installed(name)
        yield Finding(name, installed or 'not installed', '' if installed else f'pip install {name}')


def _span(tested: Sequence[tuple[int, int]]) -> str:
    return ' to '.join(f'{major}.{minor}' for major, minor in tested)


def _in_range(name: str, found: str, tested: Sequence[tuple[int, int]]) -> Finding:
    oldest, newest = tested
    number = tuple(int(part) for part in found.split('.')[:2])
    span = _span(tested)
    newer = f'; newer than the tested {span}' if number > newest else ''
    return Finding(name, f'{found}{newer}', f'use {name} {span}' if number < oldest else '')


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


def _optional_packages() -> Iterator[Finding]:
    for name, module, purpose in OPTIONAL:
        extra = f"'.[{EXTRAS[module]}]' in csg_seg's folder" if module in EXTRAS else name
        yield Finding(name, _installed(name) or f'not installed; optional, for {purpose}: pip install {extra}')
    if _installed('torchvision'):
        yield from _importing('torchvision', 'install the torchvision that was built for this torch')


def _devices() -> Iterator[Finding]:
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            yield Finding(f'GPU {index}', torch.cuda.get_device_name(index))
    else:
        yield Finding('GPU', f'none; runs on the CPU, {torch.get_num_threads()} threads')


def _importing(module: str, remedy: str) -> Iterator[Finding]:
    """Yield a finding if an installed module cannot be imported."""
    try:
        import_module(module)
    except Exception as error:  # any error is worth reporting
        yield Finding(module, f'does not import ({type(error).__name__}: {_first_line(error)})', remedy)


def _first_line(error: Any) -> str:
    return (str(error).strip().splitlines() or [''])[0][:120]


def _installed(distribution: str) -> str | None:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None
