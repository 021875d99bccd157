"""The stages from a trained dense network to the files of a generated one, each scored on the test data."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from mmengine.runner import Runner

from csg_seg.errors import CSGError
from csg_seg.files import check_folder
from csg_seg.mm.model import build_model
from csg_seg.mm.plan_files import build_dense
from csg_seg.planning.planner import plan
from csg_seg.report import summarise
from csg_seg.running.work_dir import latest_checkpoint
from experiments.carry_over.ways import way_config
from experiments.onnx_scores import open_session, predict_with
from experiments.runs.runner import call_tool, config_file, evaluate, train_and_test

Stage = dict[str, Any]


def ship(
    dense: Config, checkpoint: Path, ratios: Sequence[float], work_dir: Path, *, layers: Sequence[str], metric: str
) -> list[Stage]:
    """Plan a network for each ratio, train the first, write its files, and score everything.

    Finished stages are not repeated.

    Args:
        dense: config of a trained segmentation network, with the schedule of the training.
        checkpoint: its weights.
        ratios: dense over stored parameters.
        work_dir: folder for runs and files.
        layers: layers whose outputs the dense network teaches.
        metric: name of the score, as ``tools/test.py`` prints it.

    Returns:
        ``name``, ``stored_params`` and ``score`` of each stage, and ``bytes`` of those that are files.

    Raises:
        CSGError: a ratio is out of reach, or a stage failed.
    """
    if 'decode_head' not in dense.model:
        raise CSGError('the config has no decode_head; give the config of a segmentation network')
    check_folder(work_dir, given=f'--work-dir {work_dir}')
    network = build_dense(dense, checkpoint)
    params = summarise(network).dense_params
    scored = evaluate(dense, str(checkpoint), work_dir / 'dense', metric=metric)
    stages = [_stage('dense', params, scored['score'], checkpoint)]
    plans = {ratio: plan(network, ratio=ratio) for ratio in ratios}
    for ratio, planned in plans.items():
        fitted = way_config('fine-tune', dense, str(checkpoint), planned, layers, Path())
        scored = evaluate(fitted, str(checkpoint), work_dir / f'fit-{ratio:g}x', metric=metric)
        stages.append(_stage(f'{ratio:g}x, fit', planned.stored_params, scored['score']))
    ratio, name = ratios[0], f'trained-{ratios[0]:g}x'
    taught = way_config('features+labels', dense, str(checkpoint), plans[ratio], layers, Path())
    found = train_and_test({name: taught}, [0], work_dir, metric=metric)['networks'][name]
    trained = latest_checkpoint(work_dir / name / 'seed0')
    assert trained is not None
    stages.append(_stage(f'{ratio:g}x, trained', found['stored_params'], found['mean'], Path(trained)))
    return stages + ship_files(dense, taught, Path(trained), work_dir, metric=metric)


def ship_files(dense: Config, generated: Config, trained: Path, work_dir: Path, *, metric: str) -> list[Stage]:
    """Write a compact int8 file, a plain checkpoint and an ONNX file of a trained network, and score them.

    Args:
        dense: config of the dense network.
        generated: config of the generated network.
        trained: its weights.
        work_dir: folder for runs and files.
        metric: name of the score.
    """
    int8, plain, onnx = (work_dir / name for name in ('int8.safetensors', 'plain.pth', 'plain.onnx'))
    plain_config = config_file(work_dir / 'dense')
    runner = Runner.from_cfg(Config.fromfile(plain_config))
    image = runner.test_dataloader.dataset.get_data_info(0)['img_path']
    options: dict[str, Any] = dict(log=work_dir / 'files.txt', threads=torch.get_num_threads())
    source = [config_file(trained.parent), trained]
    for tool, file, arguments in (
        ('compact.py', int8, [*source, '--dtype', 'int8']),
        ('materialise.py', plain, source),
        ('export_onnx.py', onnx, [plain_config, plain, '--images', image]),
    ):
        if not file.exists():
            call_tool(tool, *arguments, '--out', file, **options)
    stored, params = summarise(build_model(generated)).stored_params, summarise(runner.model).dense_params
    scores = [
        evaluate(generated, str(int8), work_dir / 'int8', metric=metric)['score'],
        evaluate(dense, str(plain), work_dir / 'plain', metric=metric)['score'],
        float(score_onnx(runner, onnx)[metric]),  # NumPy's
    ]
    return [
        _stage('compact, int8', stored, scores[0], int8),
        _stage('plain', params, scores[1], plain),
        _stage('ONNX', params, scores[2], onnx),
    ]


def score_onnx(runner: Runner, file: Path) -> dict[str, float]:
    """Test an ONNX file of class scores in the place of the network that a Runner has."""
    predict_with(open_session(file, threads=torch.get_num_threads()), runner.model)
    runner._load_from = None
    return runner.test()


def _stage(name: str, params: int, score: float, file: Path | None = None) -> Stage:
    return {'name': name, 'stored_params': params, 'score': score, **({'bytes': file.stat().st_size} if file else {})}
