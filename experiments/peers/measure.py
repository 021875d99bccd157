"""Step, evaluation, memory, file and first image of the networks of a table, measured alternately."""

import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from csg_seg import load_compact, save_compact
from csg_seg.errors import CSGError
from csg_seg.layers.bank import find_bank
from csg_seg.mm.model import build_model
from csg_seg.report import summarise
from experiments.runs.table import Cell
from experiments.speed.timing import HELD, Load, Trainee

Track = Callable[[Sequence[Any]], Iterable[Any]]


def measure_peers(cells: Sequence[Cell], load: Load, *, track: Track = iter) -> dict[str, dict[str, Any]]:
    """Measure the networks of several cells in one process, by turns, on random images.

    Args:
        cells: the dense one first; the others are compared with it.
        load: load of the networks.
        track: wraps the sequence of rounds, to show progress.

    Returns:
        JSON-ready, by name of the cell: ``method``, ``stored_params``; ``flops`` of the forward pass of one image;
        ``file_bytes`` in float32; ``bytes`` held in a training step; ``step``, ``evaluation``, ``load`` and
        ``first_image``, medians in seconds, with ``step_ratio`` and ``evaluation_ratio``, medians over the rounds of
        the ratio to the first network.

    Raises:
        CSGError: the first cell is not dense.
    """
    if not cells or cells[0].method != 'dense':
        raise CSGError('the first cell must be of method dense; the others are compared with it')
    built, trainees, results = {}, {}, {}
    for cell in cells:
        cfg = cell.read_config()
        torch.manual_seed(cell.seed)
        model = build_model(cfg)
        results[cell.name] = {
            'method': cell.method,
            'stored_params': summarise(model).stored_params,
            'flops': count_flops(model, load),
        }
        built[cell.name] = deepcopy(model)
        trainees[cell.name] = Trainee(model, cfg, load)
        held = trainees[cell.name].count_bytes()
        results[cell.name]['bytes'] = {key: held[key] for key in HELD}
    seconds: dict[str, dict[str, list[float]]] = {name: {} for name in trainees}
    with tempfile.TemporaryDirectory() as folder:
        files = {cell.name: Path(folder, f'{cell.name}.safetensors') for cell in cells}
        for cell in cells:
            save(trainees[cell.name].model, files[cell.name])
            results[cell.name]['file_bytes'] = files[cell.name].stat().st_size
        for turn in track(range(load.warm_up + load.rounds)):
            # The order alternates, so that no network is always first.
            for cell in cells[:: -1 if turn % 2 else 1]:
                trainee = trainees[cell.name]
                taken = {'step': sum(trainee.step().values()), **trainee.evaluation()}
                taken |= time_first_image(built[cell.name], files[cell.name], load)
                if turn >= load.warm_up:
                    for key, value in taken.items():
                        seconds[cell.name].setdefault(key, []).append(value)
    reference = seconds[cells[0].name]
    for name, each in seconds.items():
        results[name] |= {key: statistics.median(values) for key, values in each.items()}
        for key in ('step', 'evaluation'):
            ratios = [a / b for a, b in zip(each[key], reference[key], strict=True)]
            results[name][f'{key}_ratio'] = statistics.median(ratios)
    return results


def count_flops(model: nn.Module, load: Load) -> int:
    """Return the operations of the forward pass of one image, without those of making weights."""
    model.eval()
    image = torch.zeros(1, 3, *load.size)
    with torch.no_grad():
        model(image, mode='tensor')  # weights are cached from here on
        with FlopCounterMode(display=False) as counter:
            model(image, mode='tensor')
    return counter.get_total_flops()


def save(model: nn.Module, file: Path) -> None:
    """Write a network to a file, as a compact one if it is retrofitted."""
    if find_bank(model) is None:
        save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, file)
    else:
        save_compact(model, file)


@torch.no_grad()
def time_first_image(model: nn.Module, file: Path, load: Load) -> dict[str, float]:
    """Load a file into a network that was just built, and compute one image.

    Returns:
        ``load`` and ``first_image``, which includes it, in seconds.
    """
    model, image = deepcopy(model).eval(), torch.zeros(1, 3, *load.size)
    started = time.perf_counter()
    if find_bank(model) is None:
        model.load_state_dict(load_file(file))
    else:
        load_compact(file, model)
    loaded = time.perf_counter()
    model(image, mode='tensor')
    return {'load': loaded - started, 'first_image': time.perf_counter() - started}


def held_in_step(result: Mapping[str, Any]) -> int:
    """Return the bytes that a training step holds."""
    return sum(result['bytes'][key] for key in HELD)
