"""Ways to train a generated network from a dense one, with equal numbers of training steps."""

from collections.abc import Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

from mmengine.config import Config, ConfigDict

from csg_seg.distillation import match_layers
from csg_seg.errors import CSGError
from csg_seg.files import check_folder
from csg_seg.mm.model import build_model
from csg_seg.mm.plan_files import build_dense
from csg_seg.planning.planner import Plan, plan
from csg_seg.report import summarise
from csg_seg.running.preflight import check_optimizer
from experiments.runs.runner import check_counts, evaluate, train_and_test

# Arguments of the teacher of each way; an empty dict means no teacher.
LOGITS = dict(labels=0.0, logits=0.1)
FEATURES = dict(labels=0.0, logits=0.1, features=3.0)
WAYS: dict[str, dict[str, Any]] = {
    'scratch': {},
    'fine-tune': {},
    'logits': LOGITS,
    'features': FEATURES,
    'features, no decay': FEATURES,
    'features, fast generator': FEATURES,
    'features+labels': {**FEATURES, 'labels': 1.0},
    'features+labels+channels': {**FEATURES, 'labels': 1.0, 'channels': 0.1},
    'proximal': FEATURES,
    # A larger factor suits an untrained network; it would destroy a fitted initialisation.
    'narrow': {**LOGITS, 'logits': 1.0},
}
# Optimizer settings of a way for parameters whose names contain a key: generators and codes.
PARAMWISE: dict[str, dict[str, Any]] = {
    'features, no decay': {'csg.': dict(decay_mult=0.0), '.code': dict(decay_mult=0.0)},
    'features, fast generator': {'csg.': dict(lr_mult=3.0)},
}


def carry_over(
    dense: Config,
    checkpoint: str,
    ratios: Sequence[float],
    ways: Sequence[str] | None,
    work_dir: str | Path,
    *,
    layers: Sequence[str],
    seeds: Sequence[int] = (0,),
    **options: Any,
) -> dict[str, Any]:
    """Plan a network for each ratio and train it in each way, with the schedule of the config.

    Args:
        dense: the trained network's config, with the schedule of the fine-tuning.
        checkpoint: its weights.
        ratios: dense over stored parameters.
        ways: keys of :data:`WAYS`; None for all that the config allows.
        work_dir: folder that gets one folder for each run.
        layers: layers whose outputs are compared, see :class:`csg_seg.mm.teacher.ConfiguredTeacher`.
        seeds: seeds of data order, augmentation and initial values; the first phase of the
            proximal way runs only with the first.
        options: ``metric`` and ``jobs`` of :func:`experiments.runs.runner.train_and_test`.

    Returns:
        the dense network's score; for each ratio the settings, the score after the fit,
        and the result of ``train_and_test`` for each way.

    Raises:
        CSGError: a ratio is out of reach, a way is unknown, or a run failed.
    """
    possible = possible_ways(dense)
    ways = possible if ways is None else ways
    unknown = [way for way in ways if way not in possible]
    if unknown:
        raise CSGError(f'the way {unknown[0]!r} is not possible here; choose from {", ".join(possible)}')
    work_dir, checkpoint = Path(work_dir), str(Path(checkpoint).resolve())
    check_folder(work_dir, given=f'--work-dir {work_dir}')
    check_counts(seeds, options.get('jobs', 1))
    network = build_dense(dense, checkpoint)
    check_optimizer(dense, network)
    match_layers(network, layers)
    scores = evaluate(dense, checkpoint, work_dir / 'dense', **options)
    result: dict[str, Any] = {'dense': {'stored_params': summarise(network).stored_params, **scores}, 'ratios': {}}
    for ratio in ratios:
        planned = plan(network, ratio=ratio)
        folder = work_dir / f'{ratio:g}x'
        start = folder.resolve() / 'proximal start' / f'seed{seeds[0]}' / f'epoch_{_first_epochs(dense)}.pth'
        configs = {way: way_config(way, dense, checkpoint, planned, layers, start) for way in ways}
        if 'proximal' in configs:
            first_phase = proximal_start(dense, checkpoint, planned, layers)
            train_and_test({'proximal start': first_phase}, seeds[:1], folder, **options)
        fitted = evaluate(_generated(dense, planned.csg), checkpoint, folder / 'fitted', **options)
        trained = train_and_test(configs, seeds, folder, **options)
        result['ratios'][f'{ratio:g}'] = {'csg': planned.csg, 'fitted': fitted, **trained}
    return result


def possible_ways(dense: Config) -> list[str]:
    """Return the ways that a config allows.

    Some need a segmentation network, a schedule in epochs, or a network with adjustable width.
    """
    needs = {
        'features+labels+channels': 'decode_head' in dense.model,
        'proximal': dense.train_cfg.get('max_epochs', 0) > 1 and _ends_with_cosine(dense),
        'narrow': dense.model.backbone.type == 'CIFARResNet',
    }
    return [way for way in WAYS if needs.get(way, True)]


def _ends_with_cosine(dense: Config) -> bool:
    schedulers = dense.get('param_scheduler')
    return isinstance(schedulers, list) and schedulers[-1].type == 'CosineAnnealingLR'


def way_config(way: str, dense: Config, checkpoint: str, planned: Plan, layers: Sequence[str], start: Path) -> Config:
    """Return the config of one way.

    Args:
        way: key of :data:`WAYS`.
        dense: config of the dense network, with the schedule.
        checkpoint: its weights.
        planned: settings of the generators.
        layers: layers whose outputs the teacher compares.
        start: checkpoint of the first phase of the proximal way.
    """
    teacher = {'checkpoint': checkpoint, **WAYS[way]}
    if 'features' in teacher:
        teacher['layers'] = list(layers)
    if way == 'narrow':
        return _narrower(dense, teacher, planned.stored_params)
    if way == 'proximal':
        cfg = taught_from(start, dense, planned.csg, teacher)
        _shorten(cfg, dense.train_cfg.max_epochs - _first_epochs(dense))
        return cfg
    cfg = _generated(dense, planned.csg)
    if way == 'fine-tune':
        cfg.model.init_cfg = dict(type='Pretrained', checkpoint=checkpoint)
    elif way != 'scratch':
        cfg.model.teacher = teacher
    if way in PARAMWISE:
        cfg.optim_wrapper.paramwise_cfg = dict(custom_keys=PARAMWISE[way])
    return cfg


def taught_from(start: Path, dense: Config, csg: Sequence[Mapping[str, Any]], teacher: Mapping[str, Any]) -> Config:
    """Return the config of a generated network that starts from weights other than its teacher's.

    Args:
        start: dense checkpoint to start from.
        dense: the teacher's config, with the schedule.
        csg: settings of the generators.
        teacher: arguments of :class:`csg_seg.mm.teacher.ConfiguredTeacher`.
    """
    cfg = _generated(dense, csg)
    cfg.model.init_cfg = dict(type='Pretrained', checkpoint=str(start))
    cfg.model.teacher = dict(teacher)
    return cfg


def _generated(dense: Config, csg: Sequence[Mapping[str, Any]]) -> Config:
    cfg = deepcopy(dense)
    cfg.model = ConfigDict(dense.model, type='CSGModel', base_type=dense.model.type, csg=list(csg))
    return cfg


def proximal_start(dense: Config, checkpoint: str, planned: Plan, layers: Sequence[str]) -> Config:
    """Return the config of the first phase of the proximal way, two thirds of the epochs.

    It trains the dense network and pulls its weights towards weights that can be generated.
    """
    cfg = deepcopy(dense)
    teacher = {'checkpoint': checkpoint, 'model': dense.model.to_dict(), 'layers': list(layers), **FEATURES}
    start = dict(type='Pretrained', checkpoint=checkpoint)
    cfg.model = ConfigDict(dense.model, type='TaughtModel', base_type=dense.model.type, teacher=teacher, init_cfg=start)
    imports = [*(cfg.get('custom_imports') or {}).get('imports', []), 'experiments.carry_over.proximal']
    cfg.custom_imports = dict(imports=imports)
    cfg.default_hooks.proximal = dict(type='ProximalHook', csg=list(planned.csg))
    _shorten(cfg, _first_epochs(dense))
    return cfg


def _first_epochs(dense: Config) -> int:
    return max(1, round(dense.train_cfg.get('max_epochs', 0) * 2 / 3))


def _shorten(cfg: Config, epochs: int) -> None:
    """Train for fewer epochs, and let the last scheduler end with them."""
    cfg.train_cfg.max_epochs = epochs
    last = cfg.param_scheduler[-1]
    last.update(end=epochs, T_max=epochs - last.get('begin', 0))


def _narrower(dense: Config, teacher: Mapping[str, Any], params: int) -> Config:
    """Return the config of the widest dense network with at most this many parameters."""
    cfg = deepcopy(dense)
    for base_channels in range(16, 0, -1):
        cfg.model.backbone.base_channels = base_channels
        cfg.model.head.in_channels = 4 * base_channels
        if summarise(build_model(cfg)).stored_params <= params:
            break
    settings = dict(teacher, model=dense.model.to_dict())
    cfg.model = ConfigDict(cfg.model, type='TaughtModel', base_type=dense.model.type, teacher=settings)
    return cfg
