"""From a command line to a Runner: configs, data that is really there, processes without GPUs."""

import atexit
import gc
import os
import subprocess
from argparse import Namespace
from collections.abc import Iterator, Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from mmengine.dataset import BaseDataset
from mmengine.logging import print_log
from mmengine.optim import OptimWrapperDict, build_optim_wrapper
from mmengine.registry import DATASETS, init_default_scope
from mmengine.runner import Runner
from torch import nn

from ..errors import CSGError
from ..files import NotWrittenError, check_folder, writing
from .checkpoint import check_file
from .labels import check_labels

RESUME = '; --resume goes on from the last checkpoint'


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


def guard_checkpoints(runner: Runner, *, after: str = '') -> None:
    """Let a checkpoint that cannot be written end the run in one line, and leave no half of it.

    Args:
        runner: of a training.
        after: what else to say.
    """
    save = runner.save_checkpoint

    def save_whole(out_dir: str, filename: str, *args: Any, **options: Any) -> None:
        path = Path(out_dir, filename)
        before = _written(path)
        try:
            with writing(path, after=after):
                save(out_dir, filename, *args, **options)
        except NotWrittenError:
            if _written(path) != before:
                path.unlink(missing_ok=True)  # mmengine leaves as much as there was room for
            raise

    runner.save_checkpoint = save_whole


def _written(path: Path) -> int | None:
    """Return when a file was last written to, None if there is none."""
    return path.stat().st_mtime_ns if path.exists() else None


def check_data(cfg: Config, split: str) -> None:
    """Find out before training whether every file of a split is there.

    Args:
        cfg: a whole config.
        split: 'train', 'val' or 'test'.

    Raises:
        CSGError: a folder, a list, an image or a mask is missing, or a label is none of the network's.
    """
    init_default_scope(cfg.get('default_scope', 'mmseg'))
    remedy = f"see 'Prepare the data' in README.md, or set its data_root in {split}_dataloader"
    loader = cfg.get(f'{split}_dataloader')
    for dataset in data_sets(loader.dataset if loader else None):
        if dataset.get('backend_args') or '://' in str(dataset.get('data_root')):
            continue  # not on this file system
        root = Path(dataset.get('data_root') or '.')
        prefix = dataset.get('data_prefix') or {}
        prefixes = [prefix] if isinstance(prefix, str) else prefix.values()
        parts = [root, *(root / part for part in prefixes if part)]
        if dataset.get('ann_file'):
            parts.append(root / dataset['ann_file'])
        for part in parts:
            if not part.exists():
                raise CSGError(f'{split} data: {part} does not exist; {remedy}')
        built = _build_dataset(split, dataset, remedy)
        _check_samples(split, root, built, remedy)
        _check_classes(split, cfg.model, built)
        check_labels(cfg, split, built, dataset.get('pipeline') or [])


def latest_checkpoint(work_dir: str | os.PathLike) -> str | None:
    """Return the checkpoint that a resumed run goes on from, None where there was no run.

    Raises:
        CSGError: the folder's ``last_checkpoint``, mmengine's note of it, names none.
    """
    note = Path(work_dir, 'last_checkpoint')
    if not note.exists():
        return None
    steps = [path for path in Path(work_dir).glob('*.pth') if not path.name.startswith('best_')]
    newest = max(steps, key=lambda path: path.stat().st_mtime, default=None)
    remedy = f'add --cfg-options load_from={newest}' if newest else 'delete it to start anew'
    if not note.is_file():
        raise CSGError(f'{note}: a folder, not the name of the checkpoint to resume from; {remedy}')
    try:
        named = note.read_text().strip()
    except UnicodeDecodeError:
        named = ''
    if not named:
        raise CSGError(f'{note}: does not name the checkpoint to resume from; {remedy}')
    if '://' not in named and not Path(named).is_file():
        what = 'a folder' if Path(named).is_dir() else 'no such file'
        raise CSGError(f'{note} names {named}: {what}; {remedy}')
    return named


def check_starts(cfg: Config) -> None:
    """Find out before training whether the checkpoints it starts from are there and whole.

    Raises:
        FileNotFoundError: there is no such file.
        CSGError: the file is cut short.
    """
    model = cfg.model
    paths = [cfg.get('load_from'), (model.get('teacher') or {}).get('checkpoint'), model.get('pretrained')]
    hooks = [*(cfg.get('default_hooks') or {}).values(), *(cfg.get('custom_hooks') or [])]
    paths += [part.get('generators_from') for part in (model, *hooks) if part]
    for part in (model, model.get('backbone') or {}):
        starts = part.get('init_cfg') or []
        paths += [each.get('checkpoint') for each in (starts if isinstance(starts, (list, tuple)) else [starts])]
    for path in paths:
        if path and not isinstance(path, str):
            raise CSGError(f'a start of the training is named by {path!r}; give the path of a checkpoint')
        if path and '://' not in path:
            check_file(path)


def check_optimizer(cfg: Config, model: nn.Module) -> None:
    """Find out before training whether mmengine builds the config's optimizer, on this machine.

    Args:
        cfg: a whole config.
        model: its model.

    Raises:
        CSGError: it does not.
    """
    settings = cfg.get('optim_wrapper')
    if settings is None:
        return
    try:
        built = build_optim_wrapper(model, deepcopy(settings))
        for _, each in built.items() if isinstance(built, OptimWrapperDict) else [('', built)]:
            with each.optim_context(model):
                pass
    # What the classes that a config names make of the arguments it gives them.
    except Exception as error:
        optimizer = (settings.get('optimizer') or {}).get('type')
        said = f'{type(error).__name__}: {" ".join(str(error).split())[:300]}'
        raise CSGError(f'optim_wrapper (optimizer {optimizer}): {said}; {_optimizer_remedy(settings)}') from None


def _optimizer_remedy(settings: Mapping[str, Any]) -> str:
    """Say what to do about an optimizer that cannot be built."""
    kind = settings.get('type', 'OptimWrapper')
    if str(getattr(kind, '__name__', kind)).rpartition('.')[2] != 'AmpOptimWrapper' or torch.cuda.is_available():
        return 'correct it in the config'
    own = [key for key in ('dtype', 'loss_scale', 'use_fsdp') if key in settings]
    drop = f' and take {", ".join(own)} out of the config' if own else ''
    return f'mixed precision needs a GPU; without one, give --cfg-options optim_wrapper.type=OptimWrapper{drop}'


def use_cpu_processes(cfg: Config) -> None:
    """Prepare a multi-process launch on a machine without GPUs: gloo, BN for SyncBN.

    Does nothing where there is a GPU, or for a single process.
    """
    if cfg.launcher == 'none' or torch.cuda.is_available():
        return
    if cfg.launcher == 'slurm':
        _export_slurm_ranks()
    missing = [name for name in ('RANK', 'WORLD_SIZE', 'LOCAL_RANK', 'MASTER_ADDR') if name not in os.environ]
    if missing:
        raise CSGError(
            f'--launcher {cfg.launcher}: {missing[0]} is not set; start it by tools/dist_train.sh or the like'
        )
    torch.distributed.init_process_group('gloo')
    # Threads of gloo that still run at exit abort the process.
    atexit.register(_leave_process_group)
    cfg.env_cfg.dist_cfg = dict(backend='gloo')
    wrapper = dict(
        type='MMDistributedDataParallel',
        broadcast_buffers=False,
        find_unused_parameters=cfg.get('find_unused_parameters', False),
    )
    cfg.model_wrapper_cfg = {**wrapper, **cfg.get('model_wrapper_cfg', {}), 'device_ids': None}
    if replace_sync_bn(cfg.model):
        print_log('No GPU: SyncBN becomes BN, each process normalises its own batch.', logger='current')


def _leave_process_group() -> None:
    if torch.distributed.is_initialized():
        gc.collect()  # a wrapped model, in a cycle with its runner, keeps the group and its threads
        torch.distributed.destroy_process_group()


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


def _build_dataset(split: str, dataset: Mapping[str, Any], remedy: str) -> BaseDataset:
    try:
        return DATASETS.build({**dataset, 'pipeline': [], 'lazy_init': False, 'serialize_data': False})
    except CSGError as error:
        raise CSGError(f'{split} data: {error}') from None
    except (AssertionError, OSError, RuntimeError, ValueError) as error:  # what the libraries' data sets raise
        raise CSGError(f'{split} data: {" ".join(str(error).split())}; {remedy}') from None


def _check_samples(split: str, root: Path, dataset: BaseDataset, remedy: str) -> None:
    if len(dataset) == 0:
        raise CSGError(f'{split} data: {root} holds no sample; {remedy}')
    # Without a list, images are those that the folder holds.
    keys = ('img_path', 'seg_map_path') if dataset.ann_file else ('seg_map_path',)
    paths = [Path(sample[key]) for sample in dataset.data_list for key in keys if sample.get(key)]
    missing = [path for path in paths if not path.exists()]
    if missing:
        raise CSGError(
            f'{split} data: {len(missing)} of {len(paths)} files are missing, the first {missing[0]}; {remedy}'
        )


def _check_classes(split: str, model: Mapping[str, Any], dataset: BaseDataset) -> None:
    name = 'head' if 'head' in model else 'decode_head'
    head = model.get(name)
    head = head[-1] if isinstance(head, (list, tuple)) else head
    wanted, found = (head or {}).get('num_classes'), dataset.metainfo.get('classes')
    if wanted is not None and found is not None and wanted != len(found):
        raise CSGError(
            f'{split} data: {type(dataset).__name__} has {len(found)} classes, model.{name}.num_classes is {wanted}; '
            'make them the same'
        )


def _export_slurm_ranks() -> None:
    names = {'RANK': 'SLURM_PROCID', 'WORLD_SIZE': 'SLURM_NTASKS', 'LOCAL_RANK': 'SLURM_LOCALID'}
    missing = [name for name in names.values() if name not in os.environ]
    if missing:
        raise CSGError(f'--launcher slurm: {missing[0]} is not set; start it by srun, or tools/slurm_train.sh')
    os.environ.update({ours: os.environ[slurms] for ours, slurms in names.items()})
    if 'MASTER_ADDR' not in os.environ:
        command = ['scontrol', 'show', 'hostnames', os.environ['SLURM_NODELIST']]
        os.environ['MASTER_ADDR'] = subprocess.check_output(command, text=True).split()[0]
    os.environ.setdefault('MASTER_PORT', '29500')


def replace_sync_bn(node: Any) -> int:
    """Turn every SyncBN of a config into BN, in place; return how many."""
    if isinstance(node, (list, tuple)):
        return sum(map(replace_sync_bn, node))
    if not isinstance(node, dict):
        return 0
    found = node.get('type') == 'SyncBN'
    if found:
        node['type'] = 'BN'
    return found + sum(map(replace_sync_bn, node.values()))
