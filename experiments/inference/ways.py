"""The ways to run a trained network, each measured in new processes."""

import multiprocessing
import re
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import redirect_stdout
from functools import partial
from io import StringIO
from pathlib import Path
from typing import Any

import onnxruntime
import torch
from mmengine.config import Config, ConfigDict
from mmengine.registry import MODELS
from torch import Tensor, nn

from csg_seg import load_compact, materialise
from csg_seg.deploy.inference import load_network
from csg_seg.deploy.onnx_export import export_onnx
from csg_seg.errors import CSGError
from csg_seg.layers.bank import bank_of, find_bank
from csg_seg.mm.checkpoints.descriptions import dense_model
from csg_seg.mm.checkpoints.reading import read_checkpoint
from csg_seg.mm.checkpoints.writing import write_with_config
from csg_seg.mm.model import build_model
from csg_seg.report import summarise

# A process for each measurement: another one would find memory that is already allocated.
PROCESSES = multiprocessing.get_context('spawn')
Track = Callable[[Sequence[Any]], Iterable[Any]]


Run = Callable[[Tensor], Any]


def dense(cfg: Config, files: Mapping[str, Path]) -> Run:
    """Build the dense network and load the materialised checkpoint."""
    model = MODELS.build(ConfigDict(dense_model(cfg)))
    model.load_state_dict(read_checkpoint(files['dense'])['state_dict'])
    return partial(model.eval(), mode='tensor')


def compact(cfg: Config, files: Mapping[str, Path]) -> Run:
    """Load the compact file."""
    return partial(load_compact(files['compact']).eval(), mode='tensor')


def compact_low_memory(cfg: Config, files: Mapping[str, Path]) -> Run:
    """Load the compact file; no weight is kept."""
    return partial(load_compact(files['compact'], keep_weights=False).eval(), mode='tensor')


def onnx_dense(cfg: Config, files: Mapping[str, Path]) -> Run:
    """Load the ONNX file with the weights."""
    return _session(files['onnx'])


def onnx_generated(cfg: Config, files: Mapping[str, Path]) -> Run:
    """Load the ONNX file with the codes; onnxruntime makes the weights while it loads."""
    return _session(files['onnx generated'])


def onnx_low_memory(cfg: Config, files: Mapping[str, Path]) -> Run:
    """Load the ONNX file with the codes; without its optimisations, onnxruntime makes the weights for each image."""
    return _session(files['onnx generated'], onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL)


WAYS: dict[str, Callable[[Config, Mapping[str, Path]], Run]] = {
    'dense': dense,
    'compact': compact,
    'compact, low memory': compact_low_memory,
    'onnx': onnx_dense,
    'onnx generated': onnx_generated,
    'onnx generated, not optimised': onnx_low_memory,
}


def measure_inference(
    cfg: Config, size: Sequence[int], folder: Path, *, rounds: int, threads: int, track: Track = iter
) -> dict[str, Any]:
    """Measure each way to run a CSG network with its start values, by turns, each in a process of its own.

    Args:
        cfg: CSG config.
        size: height and width of the one image.
        folder: gets the files.
        rounds: number of processes for each way.
        threads: CPU threads of a process.
        track: wraps the sequence of all measurements, to show progress.

    Returns:
        JSON-ready: ``dense_bytes`` and ``stored_bytes`` of the parameters and ``largest_bytes`` of the largest
        generated weight; by way, ``file_bytes`` and medians of ``load`` (building included), ``first_image`` (loading
        included) and ``next_image`` in seconds, and of ``peak_bytes``, the most memory that the process took after
        its imports.

    Raises:
        CSGError: the config is dense, or a process failed.
    """
    counts, files = write_files(cfg, size, folder)
    measured: dict[str, dict[str, list[float]]] = {name: {} for name in WAYS}
    turns = [(turn, name) for turn in range(rounds) for name in (list(WAYS) if turn % 2 else list(WAYS)[::-1])]
    for _, name in track(turns):
        with PROCESSES.Pool(1) as pool:
            try:
                found = pool.apply(measure_way, (name, cfg.to_dict(), files, tuple(size), threads))
            except Exception as error:  # of the libraries, in the process
                raise CSGError(f'{name}: {type(error).__name__}: {" ".join(str(error).split())[:200]}') from None
        for key, value in found.items():
            measured[name].setdefault(key, []).append(value)
    ways = {
        name: {
            'file_bytes': _file_of(name, files).stat().st_size,
            **{key: statistics.median(values) for key, values in each.items()},
        }
        for name, each in measured.items()
    }
    return {**counts, 'ways': ways}


def write_files(cfg: Config, size: Sequence[int], folder: Path) -> tuple[dict[str, int], dict[str, Path]]:
    """Write the files of a CSG network with its start values.

    Returns:
        bytes of the parameters, and the files by the name of a way.

    Raises:
        CSGError: the config is dense.
    """
    torch.manual_seed(0)
    model = build_model(cfg).eval()
    if find_bank(model) is None:
        raise CSGError('the config is dense, so there is nothing to compare; give a CSG config')
    summary = summarise(model)
    largest = max(conv.weight_shape.numel() for conv in bank_of(model).layers.values())
    counts = {'dense_bytes': 4 * summary.dense_params, 'stored_bytes': 4 * summary.stored_params}
    counts['largest_bytes'] = 4 * largest
    names = {'dense': 'dense.pth', 'compact': 'x.safetensors', 'onnx': 'x.onnx', 'onnx generated': 'generated.onnx'}
    files = {way: folder / name for way, name in names.items()}
    write_with_config(model, model.state_dict(), files['compact'], cfg, {})
    network = load_network(None, files['compact'])
    images = [torch.zeros(1, 3, *size)]
    with redirect_stdout(StringIO()):  # torch's exporter prints
        export_onnx(network, files['onnx generated'], images)
        plain = materialise(network)
        export_onnx(plain, files['onnx'], images)
    torch.save({'state_dict': plain.state_dict()}, files['dense'])
    return counts, files


@torch.no_grad()
def measure_way(
    name: str, cfg: Mapping[str, Any], files: Mapping[str, Path], size: tuple[int, int], threads: int
) -> dict[str, float]:
    """Load a network in one way and compute an image twice, in this process."""
    torch.set_num_threads(threads)
    image = torch.rand(1, 3, *size)
    nn.functional.conv2d(torch.zeros(1, 8, 8, 8), torch.zeros(8, 8, 3, 3))  # loads the library
    before = _memory('VmRSS')
    Path('/proc/self/clear_refs').write_text('5')  # the peak starts anew
    times = [time.perf_counter()]
    run = WAYS[name](Config(cfg), files)
    times.append(time.perf_counter())
    for _ in range(2):
        run(image)
        times.append(time.perf_counter())
    start, loaded, first, second = times
    return {
        'load': loaded - start,
        'first_image': first - start,
        'next_image': second - first,
        'peak_bytes': _memory('VmHWM') - before,
    }


def _memory(key: str) -> int:
    """Return an entry of this process's status, in bytes."""
    found = re.search(rf'{key}:\s+(\d+) kB', Path('/proc/self/status').read_text())
    assert found is not None
    return int(found[1]) * 1024


def _file_of(way: str, files: Mapping[str, Path]) -> Path:
    return files[way.partition(',')[0]]


def _session(file: Path, level: Any = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL) -> Run:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = level
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(file, options, providers=['CPUExecutionProvider'])
    return lambda image: session.run(None, {'image': image.numpy()})
