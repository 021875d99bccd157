"""What workers of one training hold and exchange, and how long a step takes over a link of a given speed."""

import os
import socket
import statistics
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from mmengine.config import Config
from mmengine.optim import build_optim_wrapper
from rich.console import Console
from rich.progress import track
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook, fp16_compress_hook
from torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook import PowerSGDState, powerSGD_hook
from torch.futures import Future
from torch.nn.parallel import DistributedDataParallel

from ..bank import BANK
from ..errors import CSGError
from .batches import random_batch
from .launch import replace_sync_bn
from .links import End, limit, link, parse_rate
from .model import build_model

HOOKS = ('none', 'fp16', 'powersgd')
# Steps before anything is noted: DDP orders its buckets after the first, PowerSGD begins with its third.
WARM_UP = 3
POWERSGD_RANK = 4


@dataclass(frozen=True)
class Settings:
    """What is measured: see :func:`measure_exchange`."""

    processes: int
    hooks: Sequence[str]
    rates: Sequence[str]
    rounds: int
    batch_size: int
    size: tuple[int, int]
    threads: int


@dataclass
class CountingHook:
    """A communication hook of DDP that hands buckets to one of PyTorch's, and notes what DDP gave it.

    Attributes:
        names: of the parameters, by identity.
        hook: of :data:`HOOKS`, used for the next step.
        buckets: bytes of each bucket of the last step, in their order, and whether a generator is in it.
    """

    names: Mapping[int, str]
    hook: str = 'none'
    buckets: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._power_sgd = PowerSGDState(None, matrix_approximation_rank=POWERSGD_RANK, start_powerSGD_iter=2)

    def __call__(self, bucket: dist.GradBucket) -> Future:
        """Exchange a bucket of gradients."""
        if bucket.index() == 0:
            self.buckets.clear()
        held = any(self.names[id(parameter)].startswith(f'{BANK}.') for parameter in bucket.parameters())
        self.buckets.append({'bytes': bucket.buffer().nbytes, 'generator': held})
        if self.hook == 'fp16':
            return fp16_compress_hook(None, bucket)
        if self.hook == 'powersgd':
            # It exchanges more than once, from callbacks, in an order that gloo does not keep across
            # buckets and ranks: one bucket at a time.
            future = powerSGD_hook(self._power_sgd, bucket)
            future.wait()
            return future
        return allreduce_hook(None, bucket)


def _exchange(state: CountingHook, bucket: dist.GradBucket) -> Future[torch.Tensor]:
    return state(bucket)


class Trainee:
    """A network under DDP, with its optimizer and a batch of random images of this rank's own."""

    def __init__(self, cfg: Config, settings: Settings):
        torch.manual_seed(0)
        self.model = build_model(cfg)
        self.hook = CountingHook({id(parameter): name for name, parameter in self.model.named_parameters()})
        self.batch = random_batch(self.model, settings.batch_size, *settings.size, seed=dist.get_rank())
        self.ddp = DistributedDataParallel(self.model, broadcast_buffers=False)
        self.ddp.register_comm_hook(self.hook, _exchange)
        self.optimizer = build_optim_wrapper(self.model, cfg.optim_wrapper).optimizer

    def step(self, hook: str) -> float:
        """Train one step, all ranks at once; return its seconds."""
        self.hook.hook = hook
        self.optimizer.zero_grad()
        dist.barrier()
        start = time.perf_counter()
        loss, _ = self.model.parse_losses(self.ddp(**self.batch, mode='loss'))
        loss.backward()
        self.optimizer.step()
        return time.perf_counter() - start

    def figures(self) -> dict[str, Any]:
        """Return what a rank holds, and hands to be all-reduced in a step, in bytes."""
        parameters = list(self.model.parameters())
        held = [each for state in self.optimizer.state.values() for each in state.values()]
        return {
            'parameter_bytes': sum(each.nbytes for each in parameters),
            'gradient_bytes': sum(each.grad.nbytes for each in parameters if each.grad is not None),
            'optimizer_bytes': sum(each.nbytes for each in held if isinstance(each, torch.Tensor)),
            'all_reduced_bytes': sum(each['bytes'] for each in self.hook.buckets),
            'buckets': list(self.hook.buckets),
        }


def measure_exchange(
    cfgs: Mapping[str, Config],
    *,
    processes: int = 2,
    hooks: Sequence[str] = ('none',),
    rates: Sequence[str] = (),
    rounds: int = 3,
    batch_size: int = 2,
    size: tuple[int, int] = (64, 64),
    threads: int = 1,
) -> dict[str, Any]:
    """Train several networks by turns in processes that exchange gradients through gloo, on random images.

    Args:
        cfgs: config of each network, by name, of mmseg or mmpretrain.
        processes: ranks of the training; 2 for ``rates``.
        hooks: of :data:`HOOKS`: 'none' for DDP's own all-reduce, 'fp16' and 'powersgd' for PyTorch's.
        rates: speeds of a link between two ranks, such as '100mbit'; in each round every network takes a
            step with every hook. Without any, bytes are counted and nothing is timed.
        rounds: of steps at each rate.
        batch_size: images of each rank.
        size: height and width of them, in pixels.
        threads: of each rank.

    Returns:
        JSON-ready: ``networks``, by name what one rank holds and hands over (:meth:`Trainee.figures`); ``links``,
        by rate, network and hook the ``seconds`` of each step on the first rank and the bytes it ``sent``, by
        the interface's count. The rate 'none' is the same link, unlimited.

    Raises:
        CSGError: a setting is out of range, or this machine makes no link.
    """
    _check(processes, hooks, rates, rounds, batch_size, size, threads)
    settings = Settings(processes, hooks, rates, rounds, batch_size, size, threads)
    for cfg in cfgs.values():
        replace_sync_bn(cfg.model)
    with link() if rates else nullcontext() as ends:
        context = torch.multiprocessing.get_context('spawn')
        results = context.SimpleQueue()
        port = _free_port()
        workers = torch.multiprocessing.spawn(
            _work, (cfgs, settings, ends, port, results), nprocs=processes, join=False
        )
        while not workers.join(timeout=1):
            pass
        return results.get()


def summarise_seconds(seconds: Sequence[float], reference: Sequence[float]) -> dict[str, float]:
    """Return the median of steps, and that of the ratios to steps of the same rounds."""
    ratios = [one / other for one, other in zip(seconds, reference, strict=True)]
    return {'seconds': statistics.median(seconds), 'ratio': statistics.median(ratios)}


def _check(
    processes: int,
    hooks: Sequence[str],
    rates: Sequence[str],
    rounds: int,
    batch_size: int,
    size: Sequence[int],
    threads: int,
) -> None:
    unknown = [hook for hook in hooks if hook not in HOOKS]
    if unknown:
        raise CSGError(f'there is no hook {unknown[0]!r}; take some of {", ".join(HOOKS)}')
    if min(processes, rounds, threads, *size) < 1 or batch_size < 2:
        raise CSGError(
            f'cannot measure with processes={processes}, rounds={rounds}, batch_size={batch_size}, size={tuple(size)}, '
            f'threads={threads}: each is at least 1, and batch_size 2, because of batch norm'
        )
    for rate in rates:
        parse_rate(rate)
    if rates and processes != 2:
        raise CSGError(f'a link has two ends; take 2 processes, not {processes}')


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(('127.0.0.1', 0))
        return probe.getsockname()[1]


def _work(
    rank: int,
    cfgs: Mapping[str, Config],
    settings: Settings,
    ends: tuple[End, End] | None,
    port: int,
    results: Any,
) -> None:
    """Do one rank's part; the first gives back what is found."""
    torch.set_num_threads(settings.threads)
    address = '127.0.0.1'
    if ends is not None:
        ends[rank].enter()
        address = ends[0].address
        os.environ['GLOO_SOCKET_IFNAME'] = ends[rank].interface
    # Ranks of one machine need no host name, which may lead elsewhere.
    os.environ.setdefault('GLOO_SOCKET_IFNAME', 'lo')
    dist.init_process_group('gloo', f'tcp://{address}:{port}', rank=rank, world_size=settings.processes)
    try:
        trainees = {name: Trainee(cfg, settings) for name, cfg in cfgs.items()}
        cases = [(name, hook) for name in trainees for hook in settings.hooks]
        for name, hook in cases:
            for _ in range(WARM_UP):
                trainees[name].step(hook)
        networks = {name: trainee.figures() for name, trainee in trainees.items()}
        links = _time(trainees, cases, settings, ends) if ends is not None else {}
        dist.barrier()
        if rank == 0:
            results.put({'networks': networks, 'links': links})
    finally:
        dist.destroy_process_group()


def _time(
    trainees: Mapping[str, Trainee],
    cases: Sequence[tuple[str, str]],
    settings: Settings,
    ends: tuple[End, End],
) -> dict[str, Any]:
    first = dist.get_rank() == 0
    links: dict[str, Any] = {}
    # The first turn is not noted: connections have yet to learn how fast a link is.
    turns = [(rate, turn) for rate in ('none', *settings.rates) for turn in range(settings.rounds + 1)]
    console = Console(stderr=True)
    for rate, turn in track(turns, 'Timing', console=console, disable=not first):
        if turn == 0:
            if first:
                limit(ends, None if rate == 'none' else rate)
            links[rate] = defaultdict(lambda: defaultdict(lambda: {'seconds': [], 'sent': []}))
            dist.barrier()
        for name, hook in cases:
            before = ends[0].sent() if first else 0
            seconds = trainees[name].step(hook)
            # The other rank may wait yet for the last of what this one has sent.
            dist.barrier()
            if first and turn > 0:
                links[rate][name][hook]['seconds'].append(seconds)
                links[rate][name][hook]['sent'].append(ends[0].sent() - before)
    return {rate: {name: dict(found) for name, found in networks.items()} for rate, networks in links.items()}
