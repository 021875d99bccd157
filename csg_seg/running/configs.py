"""Read config files."""

import difflib
import inspect
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmengine.config import Config
from mmengine.runner import Runner
from mmengine.utils import import_modules_from_strings

from csg_seg.errors import CSGError
from csg_seg.files import check_folder


def load_config(
    path: str | os.PathLike,
    options: Mapping[str, Any] | None = None,
    *,
    work_dir: str | None = None,
    launcher: str = 'none',
) -> Config:
    """Read a config file for a run.

    Args:
        path: the config file.
        options: settings to override, by dotted name.
        work_dir: folder for logs and checkpoints; by default the config's, or ``work_dirs/CONFIG``.
        launcher: 'none', 'pytorch', 'slurm' or 'mpi'.

    Raises:
        FileNotFoundError: there is no such file.
        CSGError: the file is not a config, or the work folder cannot be written to.
    """
    cfg = read_config(path, options)
    cfg.launcher = launcher
    cfg.work_dir = work_dir or cfg.get('work_dir') or str(Path('work_dirs') / Path(path).stem)
    check_folder(cfg.work_dir, given=f'--work-dir {cfg.work_dir}')
    return cfg


def read_config(path: str | os.PathLike, options: Mapping[str, Any] | None = None) -> Config:
    """Read a config file.

    Args:
        path: the config file.
        options: settings to override, by dotted name.

    Raises:
        FileNotFoundError: there is no such file.
        CSGError: the file is not a config, lacks a base that it refers to, has a dict in place of another value of a
            base, has ``csg`` outside ``model``, or replaces its ``CSGModel``; or an option is misspelt.
    """
    try:
        cfg = _read_file(path)
        _remove_scope(cfg._cfg_dict)
        _check_options(cfg, options or {})
        cfg.merge_from_dict(dict(options or {}))
    except TypeError as error:  # mmengine's, of a dict that would replace another value
        if '_delete_=True' not in str(error):
            raise
        raise CSGError(f'{path}: {" ".join(str(error).split())}') from None
    if cfg.get('custom_imports'):  # the options may have added some
        import_modules_from_strings(**cfg.custom_imports)
    if 'csg' in cfg:
        raise CSGError(f'{path}: csg is a key of the config; put it into model, with type and base_type')
    has_lines = re.search(r"""^[^#\n]*type=['"]CSGModel['"]""", Path(path).read_text(), flags=re.MULTILINE)
    if has_lines and 'CSGModel' not in str(cfg.get('model')):
        raise CSGError(
            f'{path}: a later model = ... replaces the CSGModel, and the network would be dense; write one '
            'model = dict(...)'
        )
    return cfg


def _check_options(cfg: Config, options: Mapping[str, Any]) -> None:
    """Refuse an option for a key that no run reads, such as 'modle.csg', if there is a similar one."""
    other = ('auto_scale_lr', 'custom_imports', 'tta_model', 'tta_pipeline')  # not arguments of Runner
    known = [*cfg, *inspect.signature(Runner.__init__).parameters, *other]
    for option in options:
        key = option.partition('.')[0]
        close = difflib.get_close_matches(key, known, n=1, cutoff=0.75)
        if key not in known and close:
            raise CSGError(f'option {option}: the config has no {key!r}; did you mean {close[0]!r}?')


def _read_file(path: str | os.PathLike) -> Config:
    try:
        return Config.fromfile(str(path))
    except FileNotFoundError as error:
        raise FileNotFoundError(f'{path}: no such config, or one of its bases is missing ({error})') from None
    except (OSError, SyntaxError) as error:
        raise CSGError(f'{path}: not a config ({error}); give a .py file such as those in configs/') from None
    except KeyError as error:
        if '{{_base_.' not in re.sub(r'\s', '', Path(path).read_text()):
            raise
        raise CSGError(
            f"{path}: no base config has {error.args[0]!r}, which it takes from '_base_'; name one"
        ) from None


def _remove_scope(node: Any) -> None:
    """Remove the scope that mmengine adds to what is inherited from a 'csg_seg::' base.

    csg_seg has no registries of its own, and its configs use types of the config's default scope.
    """
    if isinstance(node, dict):
        if node.get('_scope_') == 'csg_seg':
            del node['_scope_']
        for each in node.values():
            _remove_scope(each)
    elif isinstance(node, (list, tuple)):
        for each in node:
            _remove_scope(each)
