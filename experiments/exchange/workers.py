"""Bytes that workers of a training hold and exchange, and seconds of a step over a link of a given speed."""

import os
import statistics
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.distributed as dist
from mmengine.config import Config
from mmengine.optim import build_optim_wrapper
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook, fp16_compress_hook
from torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook import PowerSGDState, powerSGD_hook
from torch.futures import Future
from torch.multiprocessing.spawn import ProcessException
from torch.nn.parallel import DistributedDataParallel

from csg_seg.cli.console import progress_bar
from csg_seg.errors import CSGError
from csg_seg.layers.bank import find_bank
from csg_seg.mm.model import build_model
from csg_seg.running.preflight import check_optimizer
from csg_seg.running.processes import replace_sync_bn
from experiments.batches import held_bytes, random_batch

from .links import End, limit, link, parse_rate

HOOKS = ('none', 'fp16', 'powersgd')
# Steps before the measurement: DDP orders its buckets after the first, PowerSGD starts with the third.
WARM_UP = 3
POWERSGD_RANK = 4


@dataclass(frozen=True)
class Measurement:
    """Settings of :func:`measure_exchange`.

    Attributes:
        processes: number of ranks; 2 if there are ``rates``.
        hooks: keys of :data:`HOOKS`: 'none' is DDP's all-reduce, 'fp16' and 'powersgd' are PyTorch's hooks.
        rates: speeds of a link between two ranks, such as '100mbit'; in each round every network takes a
            step with every hook. Without rates, bytes are counted and nothing is timed.
        rounds: number of steps at each rate.
        batch_size: images per rank.
        size: height and width of the images, in pixels.

    Raises:
        CSGError: a value is out of range.
    """

    processes: int = 2
    hooks: Sequence[str] = ('none',)
    rates: Sequence[str] = ()
    rounds: int = 3
    batch_size: int = 2
    size: tuple[int, int] = (64, 64)

    def __post_init__(self) -> None:
        unknown = [hook for hook in self.hooks if hook not in HOOKS]
        if unknown:
            raise CSGError(f'there is no hook {unknown[0]!r}; choose from {", ".join(HOOKS)}')
        if min(self.processes, self.rounds, *self.size) < 1 or self.batch_size < 2:
            raise CSGError(
                f'cannot measure with processes={self.processes}, rounds={self.rounds}, batch_size={self.batch_size}, '
                f'size={tuple(self.size)}: each must be at least 1, and batch_size 2, because of batch norm'
            )
        for rate in self.rates:
            parse_rate(rate)
        if self.rates and self.processes != 2:
            raise CSGError(f'a link has two ends; use 2 processes, not {self.processes}')


@dataclass
class CountingHook:
    """A DDP communication hook that records the buckets and passes them to one of PyTorch's hooks.

    Attributes:
        generator: ids of the generators' parameters.
        hook: key of :data:`HOOKS` for the next step.
        buckets: bytes of each bucket of the last step, in order, and whether it contains a generator.
    """

    generator: set[int]
    hook: str = 'none'
    buckets: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._power_sgd = PowerSGDState(None, matrix_approximation_rank=POWERSGD_RANK, start_powerSGD_iter=2)

    def exchange(self, bucket: dist.GradBucket) -> Future[torch.Tensor]:
        """Exchange a bucket of gradients."""
        if bucket.index() == 0:
            self.buckets.clear()
        held = any(id(parameter) in self.generator for parameter in bucket.parameters())
        self.buckets.append({'bytes': bucket.buffer().nbytes, 'generator': held})
        if self.hook == 'fp16':
            return fp16_compress_hook(None, bucket)  # type: ignore[arg-type]
        if self.hook == 'powersgd':
            # PowerSGD exchanges several times, from callbacks. On gloo their order differs between ranks,
            # so we exchange one bucket at a time.
            future = powerSGD_hook(self._power_sgd, bucket)
            future.wait()
            return future
        return allreduce_hook(None, bucket)  # type: ignore[arg-type]


class Trainee:
    """A network in DDP with its optimizer and a batch of random images; each rank has its own images."""

    def __init__(self, cfg: Config, measurement: Measurement):
        torch.manual_seed(0)
        self.model: Any = build_model(cfg)
        bank = find_bank(self.model)
        self.hook = CountingHook({id(parameter) for parameter in bank.parameters()} if bank else set())
        self.batch = random_batch(self.model, measurement.batch_size, *measurement.size, seed=dist.get_rank())
        self.ddp = DistributedDataParallel(self.model, broadcast_buffers=False)
        self.ddp.register_comm_hook(self.hook, CountingHook.exchange)
        self.optimizer = build_optim_wrapper(self.model, cfg.optim_wrapper).optimizer

    def step(self, hook: str) -> float:
        """Train one step; return the seconds until all ranks have finished."""
        self.hook.hook = hook
        self.optimizer.zero_grad()
        dist.barrier()
        start = time.perf_counter()
        loss, _ = self.model.parse_losses(self.ddp(**self.batch, mode='loss'))
        loss.backward()
        self.optimizer.step()
        seconds = torch.tensor(time.perf_counter() - start)
        # One rank may still be waiting for data from the other.
        dist.all_reduce(seconds, dist.ReduceOp.MAX)
        return seconds.item()

    def figures(self) -> dict[str, Any]:
        """Return the bytes that a rank holds and all-reduces in a step."""
        return {
            **held_bytes(self.model, self.optimizer),
            'all_reduced_bytes': sum(each['bytes'] for each in self.hook.buckets),
            'buckets': list(self.hook.buckets),
        }


def measure_exchange(cfgs: Mapping[str, Config], measurement: Measurement) -> dict[str, Any]:
    """Train several networks in turn, on random images, in processes that exchange gradients through gloo.

    Args:
        cfgs: mmseg or mmpretrain config of each network, by name.
        measurement: settings.

    Returns:
        JSON-ready: ``networks``, the bytes of one rank by network (:meth:`Trainee.figures`); ``links``,
        by rate, network and hook: the ``seconds`` of each step, until both ranks have finished, and the bytes
        that the first rank ``sent``, counted by the interface. The rate 'none' is the same link without a limit.

    Raises:
        CSGError: a network cannot be trained, or this machine cannot create a link.
    """
    for cfg in cfgs.values():
        replace_sync_bn(cfg.model)
        model = build_model(cfg)  # finds mistakes in a config
        check_optimizer(cfg, model)
        random_batch(model, 1, 1, 1)
    with link() if measurement.rates else nullcontext() as ends, TemporaryDirectory() as folder:
        context = torch.multiprocessing.get_context('spawn')
        results = context.SimpleQueue()
        arguments = (cfgs, measurement, ends, Path(folder, 'store'), results)
        workers = torch.multiprocessing.spawn(_work, arguments, nprocs=measurement.processes, join=False)
        try:
            while not workers.join(timeout=1):
                pass
        except ProcessException as error:
            last = str(error).strip().splitlines()[-1]
            raise CSGError(f'a worker failed: {last}') from error
        finally:
            for process in workers.processes:
                process.kill()
        return results.get()


def summarise_seconds(seconds: Sequence[float], reference: Sequence[float]) -> dict[str, float]:
    """Return the median of the seconds, and the median ratio to the reference of the same round."""
    ratios = [one / other for one, other in zip(seconds, reference, strict=True)]
    return {'seconds': statistics.median(seconds), 'ratio': statistics.median(ratios)}


def _work(
    rank: int,
    cfgs: Mapping[str, Config],
    measurement: Measurement,
    ends: tuple[End, End] | None,
    store: Path,
    results: Any,
) -> None:
    """Run one rank; the first puts the results into the queue."""
    torch.set_num_threads(1)
    if ends is not None:
        ends[rank].enter()
        os.environ['GLOO_SOCKET_IFNAME'] = ends[rank].interface
    # The host name may resolve to another interface.
    os.environ.setdefault('GLOO_SOCKET_IFNAME', 'lo')
    dist.init_process_group('gloo', f'file://{store}', rank=rank, world_size=measurement.processes)
    try:
        trainees = {name: Trainee(cfg, measurement) for name, cfg in cfgs.items()}
        cases = [(name, hook) for name in trainees for hook in measurement.hooks]
        for name, hook in cases:
            for _ in range(WARM_UP):
                trainees[name].step(hook)
        networks = {name: trainee.figures() for name, trainee in trainees.items()}
        links = _time(trainees, cases, measurement, ends) if ends is not None else {}
        dist.barrier()
        if rank == 0:
            results.put({'networks': networks, 'links': links})
    finally:
        dist.destroy_process_group()


def _time(
    trainees: Mapping[str, Trainee],
    cases: Sequence[tuple[str, str]],
    measurement: Measurement,
    ends: tuple[End, End],
) -> dict[str, Any]:
    first = dist.get_rank() == 0
    links: dict[str, Any] = {}
    # The first turn does not count: TCP still adapts to the link.
    turns = [(rate, turn) for rate in ('none', *measurement.rates) for turn in range(measurement.rounds + 1)]
    for rate, turn in progress_bar('Timing')(turns, disable=not first):
        if turn == 0:
            if first and rate != 'none':
                limit(ends, rate)
            links[rate] = defaultdict(lambda: defaultdict(lambda: {'seconds': [], 'sent': []}))
            dist.barrier()
        for name, hook in cases:
            before = ends[0].sent() if first else 0
            seconds = trainees[name].step(hook)
            if first and turn > 0:
                links[rate][name][hook]['seconds'].append(seconds)
                links[rate][name][hook]['sent'].append(ends[0].sent() - before)
    return {rate: {name: dict(found) for name, found in networks.items()} for rate, networks in links.items()}
