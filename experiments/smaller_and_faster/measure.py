"""Bytes, operations, time and scores of trained networks as ONNX files, in float32 and in int8."""

import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import onnxruntime
import torch
from mmengine.config import Config
from mmengine.evaluator import Evaluator
from mmengine.model import BaseModel
from mmengine.registry import DATASETS
from mmengine.runner import Runner
from numpy import ndarray
from torch import Tensor

from csg_seg import materialise
from csg_seg.deploy.inference import inputs, load_network
from csg_seg.deploy.onnx_export import export_onnx
from csg_seg.errors import CSGError
from csg_seg.files import write_whole
from csg_seg.layers.bank import find_bank
from experiments.onnx_scores import open_session, predict_with
from experiments.peers.measure import count_flops
from experiments.runs.int8 import write_rounded
from experiments.runs.training import Run
from experiments.speed.timing import Load

from .int8 import quantise

FORMATS = ('float32', 'int8')
Track = Callable[[Sequence[Any]], Iterable[Any]]


def measure_networks(
    runs: Sequence[Run], folder: Path, *, calibration: int, rounds: int, track: Track = iter
) -> dict[str, dict[str, Any]]:
    """Measure trained networks from the file that is shipped to the ONNX file that runs.

    The trained weights are rounded to 8 bits, as compact files store them; both ONNX files are made from these.

    Args:
        runs: trained cells of segmentation networks.
        folder: gets the files.
        calibration: number of training images to calibrate int8 on.
        rounds: number of times that each file computes an image, by turns.
        track: wraps the sequence of networks, to show progress.

    Returns:
        JSON-ready, by name of the cell: ``stored_params``, ``dense_params`` of the dense cell,
        ``shipped_bytes`` of the file with the rounded weights, ``flops`` of an image, and ``onnx``: for each format
        ``bytes``, ``milliseconds`` (median CPU time of one thread for an image), ``val`` and ``test``.

    Raises:
        CSGError: a cell is not trained, or a number is below 1.
    """
    for run in runs:
        run.trained()
    if min(calibration, rounds) < 1:
        raise CSGError('--calibration and --rounds must be at least 1')
    results: dict[str, dict[str, Any]] = {}
    sessions = {}
    for run in track(runs):
        network, shipped = load_rounded(run, folder)
        images = [inputs(network, [file]) for file in training_images(run.cfg, calibration)]
        height, width = images[0].shape[2:]
        flops = count_flops(network, Load(batch_size=2, size=(height, width)))
        run.check()  # counts parameters
        onnx = {}
        for name, file in write_onnx(network, images, folder / run.cell.label).items():
            sessions[run.cell.name, name] = session = open_session(file)
            scores = {split: score(session, network, run.cfg, split, run.table.metric) for split in ('val', 'test')}
            onnx[name] = {'bytes': file.stat().st_size, **scores}
        results[run.cell.name] = {
            'stored_params': run.stored_params,
            'dense_params': run.dense_params,
            'shipped_bytes': shipped,
            'flops': flops,
            'onnx': onnx,
        }
    for (cell, name), seconds in time_sessions(sessions, images[0].numpy(), rounds).items():
        results[cell]['onnx'][name]['milliseconds'] = 1000 * seconds
    return results


def load_rounded(run: Run, folder: Path) -> tuple[BaseModel, int]:
    """Return a plain network with a cell's trained weights rounded to 8 bits, and the bytes that they take."""
    rounded, config = folder / f'{run.cell.label}.pth', folder / f'{run.cell.label}.py'
    shipped = write_rounded(run.cfg, run.trained(), rounded)
    write_whole(config, lambda partial: partial.write_text(run.cfg.pretty_text))
    network = load_network(config, rounded)
    return (network if find_bank(network) is None else materialise(network)), shipped


def training_images(cfg: Config, count: int) -> list[str]:
    """Return the files of training images, taken at equal distances from all of them."""
    dataset = DATASETS.build(cfg.train_dataloader.dataset)
    positions = range(0, len(dataset), max(1, len(dataset) // count))
    return [dataset.get_data_info(position)['img_path'] for position in positions][:count]


def write_onnx(network: BaseModel, images: Sequence[Tensor], path: Path) -> dict[str, Path]:
    """Write a network in each format; the name of the format is appended to ``path``."""
    files = {name: path.with_name(f'{path.name}-{name}.onnx') for name in FORMATS}
    with redirect_stdout(StringIO()):  # torch's exporter prints
        export_onnx(network, files['float32'], images[:1])
    quantise(files['float32'], [image.numpy() for image in images], files['int8'])
    return files


@torch.no_grad()
def score(session: onnxruntime.InferenceSession, network: Any, cfg: Config, split: str, metric: str) -> float:
    """Return the score of an ONNX file on a split, with the network's own normalisation and resizing.

    Args:
        session: of the file.
        network: the segmentor that the file was made from; afterwards it predicts what the file does.
        cfg: config with the data.
        split: 'val' or 'test'.
        metric: name of the score.
    """
    predict_with(session, network)
    loader = Runner.build_dataloader(cfg[f'{split}_dataloader'])
    evaluator = Evaluator(cfg[f'{split}_evaluator'])
    evaluator.dataset_meta = loader.dataset.metainfo
    for batch in loader:
        evaluator.process(network.test_step(batch), batch)
    return float(evaluator.evaluate(len(loader.dataset))[metric])


def time_sessions(sessions: dict[Any, onnxruntime.InferenceSession], image: ndarray, rounds: int) -> dict[Any, float]:
    """Return each session's median seconds for an image; the sessions take turns.

    Seconds of CPU time, which other programs on the machine hardly change.
    """
    seconds: dict[Any, list[float]] = {key: [] for key in sessions}
    for turn in range(rounds + 1):
        for key, session in list(sessions.items())[:: -1 if turn % 2 else 1]:
            started = time.thread_time()
            session.run(None, {'image': image})
            if turn:  # the first allocates memory
                seconds[key].append(time.thread_time() - started)
    return {key: statistics.median(each) for key, each in seconds.items()}
