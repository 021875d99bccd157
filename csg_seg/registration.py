"""Register the parts for mmengine when both csg_seg and mmengine are imported, in either order.

Configs of version 0.2 and earlier import ``csg_seg`` and expect ``CSGModel`` to be registered. Newer configs import
``csg_seg.mm``.
"""

import sys
import warnings
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType

# Packages that import mmengine while they are imported themselves; csg_seg.mm needs them whole.
PACKAGES = ('mmengine', 'mmcv', 'mmseg', 'mmpretrain')


class _AfterMMEngine(MetaPathFinder):
    """Find mmengine and the packages around it as usual, and register once the outermost of them is imported."""

    is_searching = False
    depth = 0

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname not in PACKAGES or self.is_searching:
            return None
        self.is_searching = True
        try:
            spec = find_spec(fullname)  # by the other finders
        finally:
            self.is_searching = False
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                self.depth += 1
                try:
                    execute(module)
                finally:
                    self.depth -= 1
                if self.depth == 0 and self in sys.meta_path and 'mmengine' in sys.modules:
                    sys.meta_path.remove(self)
                    _register()

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def register_with_mmengine() -> None:
    """Import :mod:`csg_seg.mm` now if mmengine is imported, otherwise right after it."""
    if sys.modules.get('mmengine') is not None:
        _register()
    else:
        sys.meta_path.insert(0, _AfterMMEngine())


def _register() -> None:
    try:
        import_module('csg_seg.mm')
    except ImportError as error:
        warnings.warn(f'mmengine is installed, but csg_seg.mm cannot be imported: {error}', stacklevel=2)
