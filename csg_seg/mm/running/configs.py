"""Config files."""

import os
from argparse import Namespace
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mmengine.config import Config

from csg_seg.errors import CSGError
from csg_seg.files import check_folder


def load_config(args: Namespace) -> Config:
    """Read a config with the options that mmseg's tools share.

    Args:
        args: ``config``, ``cfg_options``, ``work_dir`` and ``launcher``.
    """
    cfg = read_config(args.config, args.cfg_options)
    cfg.launcher = args.launcher
    if args.work_dir is not None:
        cfg.work_dir = args.work_dir
    elif cfg.get('work_dir') is None:
        cfg.work_dir = str(Path('work_dirs') / Path(args.config).stem)
    check_folder(cfg.work_dir, given=f'--work-dir {cfg.work_dir}')
    return cfg


def read_config(path: str | os.PathLike, options: Mapping[str, Any] | None = None) -> Config:
    """Read a config file.

    Args:
        path: of the file.
        options: settings to override, by dotted name.

    Raises:
        FileNotFoundError: there is no such file.
        CSGError: it is no config.
    """
    try:
        cfg = Config.fromfile(str(path))
    except FileNotFoundError as error:
        raise FileNotFoundError(f'{path}: no such config, or one of its bases is missing ({error})') from None
    except (OSError, SyntaxError) as error:
        raise CSGError(f'{path}: no config ({error}); give a .py file such as those in configs/') from None
    _leave_scope(cfg._cfg_dict)
    cfg.merge_from_dict(dict(options or {}))
    return cfg


def _leave_scope(node: Any) -> None:
    """Let what a config inherits from a 'csg_seg::' base be built in the config's own scope.

    csg_seg registers its parts at the root, and its configs use other packages' parts.
    """
    if isinstance(node, dict):
        if node.get('_scope_') == 'csg_seg':
            del node['_scope_']
        for each in node.values():
            _leave_scope(each)
    elif isinstance(node, (list, tuple)):
        for each in node:
            _leave_scope(each)


def data_sets(dataset: Mapping[str, Any] | None) -> Iterator[Mapping[str, Any]]:
    """Yield the data sets inside wrappers such as ConcatDataset and RepeatDataset."""
    if dataset is None:
        return
    inner = dataset.get('datasets') or dataset.get('dataset')
    if inner is None:
        yield dataset
    else:
        for each in inner if isinstance(inner, (list, tuple)) else [inner]:
            yield from data_sets(each)
