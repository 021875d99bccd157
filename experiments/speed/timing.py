"""Time and memory of dense, generated and materialised networks, measured alternately on one device."""

import math
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from mmengine.config import Config, ConfigDict
from mmengine.model import BaseModel
from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from csg_seg.errors import CSGError
from csg_seg.generators.linear import Generator
from csg_seg.layers.ahead import Ahead, drop
from csg_seg.layers.bank import bank_of, find_bank
from csg_seg.layers.conv import CSGConv
from csg_seg.mm.checkpoints.descriptions import dense_model
from csg_seg.mm.model import build_model
from csg_seg.retrofitting.automatic import is_automatic
from csg_seg.retrofitting.surgery import materialise
from csg_seg.running.processes import replace_sync_bn
from experiments.batches import held_bytes, random_batch

WORK = ('step', 'evaluation', 'generation')
PHASES = ('forward', 'backward', 'optimizer')
FLOAT32, ONCE = 'csg, float32', 'csg, generated once'
HELD = ('parameter_bytes', 'gradient_bytes', 'optimizer_bytes', 'activation_bytes')


@dataclass(frozen=True)
class Load:
    """Load of the networks in :func:`measure_speed`.

    Attributes:
        batch_size: images in a training step.
        size: height and width of all images, in pixels.
        eval_batch_size: images in an evaluation.
        rounds: measured rounds; in each, every network takes a step and later an evaluation.
        warm_up: rounds before the measured ones.
        device: device such as 'cpu' or 'cuda'.
        bf16: whether to compute under autocast to bfloat16.
        channels_last: whether networks and images are in channels-last format.
        compile: whether to compile the networks, generation included.
        accumulate: batches in a training step.

    Raises:
        CSGError: a value is out of range.
    """

    batch_size: int
    size: tuple[int, int]
    eval_batch_size: int = 1
    rounds: int = 10
    warm_up: int = 3
    device: str = 'cpu'
    bf16: bool = False
    channels_last: bool = False
    compile: bool = False
    accumulate: int = 1

    def __post_init__(self) -> None:
        if min(self.eval_batch_size, self.rounds, self.warm_up, self.accumulate, *self.size) < 1 or self.batch_size < 2:
            raise CSGError(
                f'cannot measure with batch_size={self.batch_size}, eval_batch_size={self.eval_batch_size}, '
                f'size={tuple(self.size)}, rounds={self.rounds}, warm_up={self.warm_up}, '
                f'accumulate={self.accumulate}: each must be at least 1, and batch_size 2, because of batch norm'
            )
        if self.device == 'cuda' and not torch.cuda.is_available():
            raise CSGError('there is no GPU here; use device cpu')


def training_load(cfg: Config) -> dict[str, Any]:
    """Return the ``batch_size`` and ``size`` that a config trains with, if it specifies them."""
    load: dict[str, Any] = {}
    if cfg.get('train_dataloader'):
        load['batch_size'] = cfg.train_dataloader.batch_size
    for transform in cfg.get('train_pipeline') or ():
        size = transform.get('crop_size', transform.get('scale')) if 'Crop' in str(transform.get('type')) else None
        if size:
            load['size'] = (size, size) if isinstance(size, int) else tuple(size)
    return load


class Clock:
    """Times the spans between marks: with CUDA events on a GPU, with the wall clock elsewhere."""

    def __init__(self, device: str):
        self.on_gpu = device.startswith('cuda')
        self.moments: list[Any] = []

    def mark(self) -> None:
        """End a span and start the next."""
        if self.on_gpu:
            self.moments.append(torch.cuda.Event(enable_timing=True))
            self.moments[-1].record()
        else:
            self.moments.append(time.perf_counter())

    def spans(self) -> list[float]:
        """Return the seconds between marks."""
        pairs = list(zip(self.moments, self.moments[1:], strict=False))
        if self.on_gpu:
            torch.cuda.synchronize()
            return [start.elapsed_time(end) / 1000 for start, end in pairs]
        return [end - start for start, end in pairs]


class Trainee:
    """A network on a device with its optimizer and images.

    Args:
        model: the network.
        cfg: its optimizer is used.
        load: load of the network.
        generates_once: whether weights are generated once for the batches of a step.
    """

    def __init__(self, model: BaseModel, cfg: Config, load: Load, *, generates_once: bool = False):
        self.load, self.generates_once = load, generates_once
        layout = torch.channels_last if load.channels_last else torch.contiguous_format
        self.model = model.to(load.device).to(memory_format=layout)  # type: ignore[call-overload]
        self.batch = random_batch(self.model, load.batch_size, *load.size)
        self.batch['inputs'] = self.batch['inputs'].contiguous(memory_format=layout)
        images = torch.randn(load.eval_batch_size, 3, *load.size, generator=torch.Generator().manual_seed(0))
        self.images = images.to(load.device, memory_format=layout)
        # Only the optimizer: the load sets the precision.
        kept = ('optimizer', 'paramwise_cfg', 'constructor')
        optim_wrapper = {key: cfg.optim_wrapper[key] for key in kept if key in cfg.optim_wrapper}
        self.optimizer = build_optim_wrapper(self.model, {'type': 'OptimWrapper', **optim_wrapper}).optimizer
        if load.compile:
            self.model.compile()

    def _precision(self) -> AbstractContextManager[Any]:
        return torch.autocast(self.load.device, torch.bfloat16) if self.load.bf16 else nullcontext()

    def _accumulation(self) -> AbstractContextManager[Any]:
        return bank_of(self.model).accumulate() if self.generates_once else nullcontext()

    def _loss(self) -> Tensor:
        with self._precision():
            loss, _ = self.model.parse_losses(self.model(**self.batch, mode='loss'))
        return loss

    def step(self) -> dict[str, float]:
        """Train one step; return the seconds of each phase."""
        self.model.train()
        self.optimizer.zero_grad()
        clock = Clock(self.load.device)
        clock.mark()
        with self._accumulation():
            for _ in range(self.load.accumulate):
                loss = self._loss()
                clock.mark()
                loss.backward()
                clock.mark()
        clock.mark()  # after gradients were sent through the generators
        self.optimizer.step()
        clock.mark()
        *batches, sending, optimizer = clock.spans()
        return dict(zip(PHASES, (sum(batches[::2]), sum(batches[1::2]) + sending, optimizer), strict=True))

    def count_operations(self) -> int:
        """Train a step without the optimizer; return the floating-point operations of its convs and products."""
        self.model.train()
        eager, counter = torch.compiler.set_stance('force_eager'), FlopCounterMode(display=False)
        with eager, counter, self._accumulation():
            for _ in range(self.load.accumulate):
                self._loss().backward()
        self.optimizer.zero_grad()
        return counter.get_total_flops()

    @torch.no_grad()
    def evaluation(self) -> dict[str, float]:
        """Compute class scores twice; return the seconds of the second time."""
        self.model.eval()
        clock = Clock(self.load.device)
        with self._precision():
            for _ in range(2):
                clock.mark()
                self.model(self.images, mode='tensor')
        clock.mark()
        return {'evaluation': clock.spans()[1]}

    def generation(self) -> dict[str, float]:
        """Generate all weights and backpropagate through generation; return the seconds."""
        bank = find_bank(self.model)
        assert bank is not None
        gradients = [torch.ones(conv.weight_shape, device=self.load.device) for conv in bank.layers.values()]
        self.optimizer.zero_grad()
        clock = Clock(self.load.device)
        clock.mark()
        bank.ahead.make(bank, bank.layers)
        torch.autograd.backward([conv.weight for conv in bank.layers.values()], gradients)
        clock.mark()
        drop(bank.layers)
        return {'generation': sum(clock.spans())}

    def count_bytes(self) -> dict[str, int]:
        """Train two steps; return the bytes held in the second, and on a GPU the allocator's peak."""
        self.step()  # creates optimizer state
        self.optimizer.zero_grad()
        on_gpu = self.load.device.startswith('cuda')
        before = torch.cuda.memory_allocated() if on_gpu else 0
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
        # Keeps storages alive, so that addresses are not reused.
        saved: dict[int, torch.UntypedStorage] = {}

        def note(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            saved[storage.data_ptr()] = storage
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            loss = self._loss()
        for tensor in (*self.model.parameters(), *self.model.buffers(), *self.batch.values()):
            if isinstance(tensor, Tensor):
                saved.pop(tensor.untyped_storage().data_ptr(), None)
        activation_bytes = sum(storage.nbytes() for storage in saved.values())
        saved.clear()
        loss.backward()
        self.optimizer.step()
        held = {**held_bytes(self.model, self.optimizer), 'activation_bytes': activation_bytes}
        if on_gpu:
            # `before` contains parameters and optimizer state of all networks.
            own = held['parameter_bytes'] + held['optimizer_bytes']
            held['peak_bytes'] = torch.cuda.max_memory_allocated() - before + own
        return held


def measure_speed(
    cfg: Config,
    load: Load,
    *,
    without_ahead: bool = False,
    float32_generation: bool = False,
    track: Callable[[Sequence[tuple[str, int]]], Iterable[tuple[str, int]]] = iter,
) -> dict[str, dict[str, Any]]:
    """Train and evaluate a network dense, generated and materialised alternately in one process, on random images.

    Args:
        cfg: CSG config of mmseg or mmpretrain; its teacher is ignored.
        load: load of the networks.
        without_ahead: also measure the generated network with each layer making its own weight in each pass.
        float32_generation: also measure the generated network with ``precision='float32'``.
        track: wraps the sequence of all rounds, to show progress.

    Returns:
        JSON-ready, by network: ``seconds`` of each round, by phase, and of ``evaluation``; for the generated
        network also ``generation``, forward and backward; ``bytes`` held in a step; ``operations`` of a step. If
        several batches are accumulated, also the generated network whose weights are generated once a step.

    Raises:
        CSGError: the config is dense, or the network does not accept such images.
    """
    cfg = deepcopy(cfg)
    replace_sync_bn(cfg.model)
    cfg.model.pop('teacher', None)
    csg = build_model(cfg)
    if find_bank(csg) is None:
        raise CSGError('the config is dense, so there is nothing to compare; give a CSG config')
    dense = MODELS.build(ConfigDict(dense_model(cfg)))
    models = {'dense': dense, 'csg': csg, 'materialised': materialise(deepcopy(csg))}
    if without_ahead:
        models['csg, not ahead'] = never_ahead(deepcopy(csg))
    if float32_generation:
        if not load.bf16:
            raise CSGError('generation is in float32 already; to compare precisions, add --bf16')
        if is_automatic(cfg.model.csg):
            raise CSGError('give the slice_shape and code_dim that csg_seg.suggest found, to compare precisions')
        several = cfg.model.csg if isinstance(cfg.model.csg, list) else [cfg.model.csg]
        cfg.model.csg = [{**each, 'precision': 'float32'} for each in several]
        models[FLOAT32] = build_model(cfg)
    if load.accumulate > 1:
        models[ONCE] = deepcopy(csg)
    trainees: dict[str, Trainee] = {}
    results: dict[str, dict[str, Any]] = {}
    for name, model in models.items():
        try:
            trainees[name] = Trainee(model, cfg, load, generates_once=name == ONCE)
            operations = trainees[name].count_operations()
            results[name] = {'bytes': trainees[name].count_bytes(), 'operations': operations, 'seconds': {}}
        except Exception as error:  # a network may fail in any way on a size
            said = ' '.join(str(error).split())[:200] or type(error).__name__
            raise CSGError(
                f'no step on {load.batch_size} images of {"x".join(map(str, load.size))} pixels: {said}'
            ) from None
    names = list(trainees)
    # One kind of work after the other: otherwise steps reallocate the memory that generation frees.
    turns = [(work, turn) for work in WORK for turn in range(load.warm_up + load.rounds)]
    for work, turn in track(turns):
        # The order alternates, so that no network is always first.
        for name in ['csg'] if work == 'generation' else names[:: -1 if turn % 2 else 1]:
            seconds = getattr(trainees[name], work)()
            if turn >= load.warm_up:
                for key, value in seconds.items():
                    results[name]['seconds'].setdefault(key, []).append(value)
    return results


class NeverAhead(Ahead):
    """Neither makes weights ahead nor caches them."""

    def make(self, generators: Iterable[Generator], layers: Mapping[str, CSGConv]) -> None:
        """Make nothing."""


def never_ahead(model: nn.Module) -> nn.Module:
    """Let each layer of a retrofitted network make its own weight in each forward pass.

    Args:
        model: retrofitted network, changed in place.
    """
    bank_of(model).ahead = NeverAhead()
    return model


def step_seconds(result: Mapping[str, Any]) -> list[float]:
    """Return the seconds of each training step of one network in :func:`measure_speed`'s result."""
    return [sum(phases) for phases in zip(*(result['seconds'][phase] for phase in PHASES), strict=True)]


def matmul_rate(device: str, dtype: torch.dtype) -> float:
    """Return the floating-point operations per second of a product of two matrices of 1024 x 1024."""
    size, best = 1024, math.inf
    one, other = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    for _ in range(10):
        clock = Clock(device)
        clock.mark()
        one @ other
        clock.mark()
        best = min(best, *clock.spans())
    return 2 * size**3 / best


def summarise_speed(
    results: Mapping[str, Mapping[str, Any]], load: Load, *, slower_generation: float = 1.0
) -> dict[str, dict[str, float]]:
    """Return, for each network, medians and median ratios to the dense network in the same round.

    Args:
        results: of :func:`measure_speed`.
        load: its load.
        slower_generation: how many times longer an operation takes in float32 than in the networks' precision.

    Returns:
        by network: ``step`` and ``evaluation`` in seconds, each also with ``_ratio`` and ``_spread`` (the
        interquartile range relative to the median); ``images_per_second`` of training; ``memory_ratio``;
        ``floor``, the step ratio if time were in proportion to operations, those of generation in float32 weighted by
        ``slower_generation``; for the generated network, ``generation_share`` of the step.
    """
    dense = results['dense']
    summary: dict[str, dict[str, float]] = {}
    for name, each in results.items():
        numbers: dict[str, float] = {}
        series = {'step': (step_seconds(each), step_seconds(dense))}
        series['evaluation'] = (each['seconds']['evaluation'], dense['seconds']['evaluation'])
        for key, (seconds, reference) in series.items():
            numbers[key] = statistics.median(seconds)
            numbers[f'{key}_ratio'] = statistics.median(a / b for a, b in zip(seconds, reference, strict=True))
            numbers[f'{key}_spread'] = _spread(seconds)
        numbers['images_per_second'] = load.batch_size * load.accumulate / numbers['step']
        added = each['operations'] / dense['operations'] - 1
        numbers['floor'] = 1 + added * (slower_generation if name == FLOAT32 else 1)
        numbers['memory_ratio'] = _memory(each) / _memory(dense)
        if 'generation' in each['seconds']:
            numbers['generation_share'] = statistics.median(each['seconds']['generation']) / numbers['step']
        summary[name] = numbers
    return summary


def _spread(seconds: Sequence[float]) -> float:
    if len(seconds) < 2:
        return 0.0
    low, middle, high = statistics.quantiles(seconds, n=4, method='inclusive')
    return (high - low) / middle


def _memory(result: Mapping[str, Any]) -> int:
    held = result['bytes']
    return held['peak_bytes'] if 'peak_bytes' in held else sum(held[key] for key in HELD)
