"""Federated averaging: workers with disjoint parts of the data exchange codes, or whole networks."""

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import deepcopy
from fnmatch import fnmatchcase
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from mmengine.registry import DATASETS
from mmengine.runner import Runner
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from csg_seg.cli.options import check_out
from csg_seg.errors import CSGError, abridge
from csg_seg.files import check_folder, write_tensors
from csg_seg.mm.hooks.checkpoint_guard import CheckpointGuardHook
from csg_seg.mm.hooks.label_guard import LabelGuardHook
from csg_seg.mm.model import build_model
from csg_seg.running.configs import read_config
from csg_seg.running.preflight import check_data, check_optimizer, check_starts


def federate(
    cfg: Config,
    checkpoint: str | os.PathLike,
    travels: str = '*',
    *,
    workers: int,
    rounds: int,
    steps: int,
    out: str | os.PathLike,
    test_every: int = 1,
    metric: str = 'mIoU',
    track: Callable[[Sequence[int]], Iterable[int]] = iter,
) -> dict[str, Any]:
    """Train by federated averaging (McMahan et al., AISTATS 2017).

    In each round every worker loads the shared tensors, trains them on its part of the
    training data with its own optimizer, and returns them. Their mean is shared in the
    next round; it needs no weights, since all parts have the same size. All other
    tensors keep the values of the checkpoint.

    Args:
        cfg: config of the network, dense or CSG; its schedulers are not used.
        checkpoint: initial weights of all workers.
        travels: pattern of state dict names to train and exchange, frozen parameters excepted.
        workers: number of parts of the training data; neighbouring images stay together.
        rounds: rounds of averaging.
        steps: training steps of each worker in a round.
        out: file for the checkpoint of the last mean.
        test_every: rounds between two tests; the start and the last round are always tested.
        metric: name of the score.
        track: wraps the sequence of all turns of workers, to show progress.

    Returns:
        JSON-ready: ``tensors`` and ``bytes`` that one worker sends in a round, and ``scores``: ``round``, the
        ``bytes`` sent to and from all workers so far, ``score``.

    Raises:
        CSGError: a number is out of range, nothing trained matches ``travels``, or the metric does not exist.
    """
    _check_numbers(workers=workers, rounds=rounds, steps=steps, test_every=test_every)
    runner = _build_runner(cfg, checkpoint)
    scores = [{'round': 0, 'bytes': 0, 'score': _score(runner, metric)}]
    shared = _shared(runner.model, travels)
    batches = [iter(Runner.build_dataloader(loader, seed=runner.seed)) for loader in _loaders(cfg, workers)]
    in_a_round = 2 * workers * _bytes(shared.values())
    returned: list[dict[str, Tensor]] = []
    for turn in track(range(rounds * workers)):
        returned.append(_train(runner, shared, islice(batches[turn % workers], steps)))
        if len(returned) == workers:
            shared = _mean(returned)
            returned.clear()
            done = turn // workers + 1
            if done % test_every == 0 or done == rounds:
                _set(runner.model, shared)
                scores.append({'round': done, 'bytes': in_a_round * done, 'score': _score(runner, metric)})
    _write_checkpoint(runner, out)
    return {'travels': travels, 'tensors': len(shared), 'bytes': _bytes(shared.values()), 'scores': scores}


def read_networks(
    networks: Sequence[tuple[str, str, str, str]],
    work_dir: str,
    *,
    seed: int = 0,
    cfg_options: Mapping[str, Any] | None = None,
    overwrite: bool = False,
    **numbers: int,
) -> dict[str, Config]:
    """Read the configs of a comparison, and find mistakes before any network is trained.

    Args:
        networks: name, config, checkpoint and ``travels`` of each network.
        work_dir: folder for logs and checkpoints.
        seed: seed of data order and augmentation.
        cfg_options: overridden settings of all configs.
        overwrite: whether existing checkpoints may be replaced.
        numbers: ``workers``, ``rounds``, ``steps`` and ``test_every`` of :func:`federate`.

    Returns:
        the config of each network, by name.

    Raises:
        FileNotFoundError: a file is missing.
        CSGError: a config, checkpoint or number is wrong.
    """
    _check_numbers(**numbers)
    check_folder(work_dir, given=f'--work-dir {work_dir}')
    configs: dict[str, Config] = {}
    for name, config, checkpoint, travels in networks:
        if name in configs or '/' in name:
            raise CSGError(f'--network {name}: give each network its own name, without a slash')
        out = Path(work_dir, f'{name}.pth')
        check_out(out, overwrite=overwrite, option='--work-dir', inputs=[checkpoint])
        options = {'randomness.seed': seed, 'work_dir': work_dir, 'experiment_name': name}
        cfg = configs[name] = read_config(config, {**options, **(cfg_options or {}), 'load_from': checkpoint})
        for split in ('train', 'test'):
            check_data(cfg, split)
        check_starts(cfg)
        model = build_model(cfg)
        check_optimizer(cfg, model)
        _shared(model, travels)
        _loaders(cfg, numbers['workers'])
    return configs


def _check_numbers(**numbers: int) -> None:
    if min(numbers.values()) < 1:
        given = ', '.join(f'{key}={value}' for key, value in numbers.items())
        raise CSGError(f'cannot work with {given}: each must be at least 1')


def _shared(model: nn.Module, travels: str) -> dict[str, Tensor]:
    """Return copies of the tensors to train and exchange, and freeze all other parameters."""
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    chosen = [name for name in _tensors(model) if fnmatchcase(name, travels) and name not in frozen]
    parameters = dict(model.named_parameters())
    for name, parameter in parameters.items():
        parameter.requires_grad_(name in chosen)
    if not parameters.keys() & set(chosen):
        some = abridge([name for name, parameter in model.named_parameters() if name not in frozen])
        raise CSGError(f'{travels!r} matches nothing that is trained; trained are {some}')
    return {name: tensor.clone() for name, tensor in _tensors(model).items() if name in chosen}


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return the floating-point tensors of the state dict; they share memory with the model."""
    state_dict = model.state_dict().items()
    return {name: each for name, each in state_dict if isinstance(each, Tensor) and each.is_floating_point()}


def _get(model: nn.Module, names: Iterable[str]) -> dict[str, Tensor]:
    tensors = _tensors(model)
    return {name: tensors[name].clone() for name in names}


def _set(model: nn.Module, shared: Mapping[str, Tensor]) -> None:
    tensors = _tensors(model)
    for name, tensor in shared.items():
        tensors[name].copy_(tensor)


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)


def _loaders(cfg: Config, workers: int) -> list[dict[str, Any]]:
    """Return the settings of each worker's data loader; neighbouring images stay together."""
    dataset = DATASETS.build(cfg.train_dataloader.dataset)
    if len(dataset) < workers:
        raise CSGError(f'{len(dataset)} training images are too few for {workers} workers; use fewer workers')
    bounds = [len(dataset) * worker // workers for worker in range(workers + 1)]
    loaders = []
    for first, last in zip(bounds, bounds[1:], strict=False):
        loader = deepcopy(cfg.train_dataloader)
        loader['dataset'] = dataset.get_subset(list(range(first, last)))
        loader['sampler'] = dict(type='InfiniteSampler', shuffle=True)
        loaders.append(loader)
    return loaders


def _build_runner(cfg: Config, checkpoint: str | os.PathLike) -> Runner:
    cfg = deepcopy(cfg)
    cfg.load_from = str(checkpoint)
    runner = Runner.from_cfg(cfg)
    runner.register_hook(CheckpointGuardHook())
    runner.register_hook(LabelGuardHook(cfg))
    return runner


def _train(runner: Runner, shared: Mapping[str, Tensor], batches: Iterable[Any]) -> dict[str, Tensor]:
    """Train one worker from the shared tensors, with a new optimizer, and return its tensors."""
    model = runner.model.train()
    _set(model, shared)
    for name, module in model.named_modules():
        if isinstance(module, _BatchNorm) and f'{name}.running_mean' not in shared:
            module.eval()
    optim_wrapper = runner.build_optim_wrapper(deepcopy(runner.cfg.optim_wrapper))
    for batch in batches:
        model.train_step(batch, optim_wrapper)
    return _get(model, shared)


def _mean(tensors: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.stack([each[name] for each in tensors]).mean(0) for name in tensors[0]}


def _write_checkpoint(runner: Runner, out: str | os.PathLike) -> None:
    meta = {'dataset_meta': runner.test_dataloader.dataset.metainfo}
    write_tensors(Path(out), {'meta': meta, 'state_dict': runner.model.state_dict()})


def _score(runner: Runner, metric: str) -> float:
    scores = runner.test()
    if metric not in scores:
        raise CSGError(f'there is no metric {metric!r}; the test gave {", ".join(scores)}')
    return float(scores[metric])
