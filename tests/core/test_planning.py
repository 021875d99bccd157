"""Plans: budgets are met, errors are those of a fit, the tools write what was planned."""

import copy
import json
import math
import re

import pytest
import torch
from conftest import ROOT, run_tool
from mmengine.config import Config
from torch import nn
from torchvision import models

import csg_seg
from csg_seg.errors import CSGError
from csg_seg.generators.slices import join
from csg_seg.mm.model import build_model
from csg_seg.models import CIFARResNet
from csg_seg.planning.planner import predict, trade_off
from csg_seg.running.configs import read_config

# A few shapes, so that a test takes seconds.
SHAPES = [(4, 4, 3, 3), (8, 8, 3, 3), (16, 8, 3, 3), (16, 16, 1, 1)]
PAPER = [dict(slice_shape=(12, 12, 3, 3), code_dim=72), dict(slice_shape=(16, 16, 3, 3), code_dim=128)]
RESNET20 = ROOT / 'configs' / 'cifar10' / 'resnet20_b64-20e_cifar10-npz.py'


class Odd(nn.Module):
    """All kernels and odd channels, and layers that no generator takes."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 31, 3)
        self.body = nn.Sequential(nn.Conv2d(31, 17, 3), nn.Conv2d(17, 31, 5), nn.BatchNorm2d(31), nn.Conv2d(31, 62, 7))
        self.wide = nn.Sequential(nn.Conv2d(62, 31, (1, 7)), nn.Conv2d(31, 62, (7, 1)), nn.Conv2d(62, 93, 1))
        self.head = nn.ModuleList([nn.Conv2d(93, 31, 3), nn.Conv2d(31, 93, 3), nn.Conv2d(93, 17, 1, bias=False)])
        self.grouped = nn.Conv2d(62, 62, 3, groups=2)
        self.frozen = nn.Conv2d(31, 31, 3).requires_grad_(False)
        self.tied = nn.ModuleList([nn.Conv2d(31, 31, 3), nn.Conv2d(31, 31, 3)])
        self.tied[1].weight = self.tied[0].weight
        self.zero = nn.Conv2d(31, 31, 3)
        nn.init.zeros_(self.zero.weight)


def build(name):
    torch.manual_seed(0)
    if name == 'deeplab':
        return build_model(read_config(str(ROOT / 'configs/demo/deeplabv3_r18-d8-w32_drawn-voc-64x64.py')))
    builders = {'resnet20': lambda: CIFARResNet(20), 'resnet56': lambda: CIFARResNet(56), 'odd': Odd}
    return (builders | {'resnet18': models.resnet18})[name]()


def shapes_for(name):
    return {'odd': None, 'resnet20': SHAPES}.get(name, [(8, 8, 3, 3), (16, 16, 1, 1)])


def check_counts(dense, planned):
    summary = csg_seg.summarise(csg_seg.retrofit(copy.deepcopy(dense), planned.csg))
    counts = ('dense_params', 'stored_params', 'stored_bytes', 'compression_ratio')
    assert planned.csg
    assert {key: getattr(planned, key) for key in counts} == {key: getattr(summary, key) for key in counts}
    generated = {layer.name for layer in summary.layers if layer.generator is not None}
    assert {name for name, error in planned.layers.items() if error > 0} <= generated
    assert set(planned.layers) == {layer.name for layer in summary.layers}


@pytest.mark.parametrize('name', ['resnet20', 'resnet56', 'resnet18', 'deeplab', 'odd'])
def test_a_plan_keeps_to_its_budget_and_counts_as_retrofit_does(name):
    dense = build(name)
    before = {key: value.clone() for key, value in dense.state_dict().items()}
    summary = csg_seg.summarise(dense)
    by_ratio = csg_seg.plan(dense, ratio=1.9, slice_shapes=shapes_for(name))
    assert 1.9 <= by_ratio.compression_ratio < 1.95
    by_bytes = csg_seg.plan(dense, bytes=summary.dense_bytes // 2, slice_shapes=shapes_for(name))
    assert 0.98 * (summary.dense_bytes // 2) < by_bytes.stored_bytes <= summary.dense_bytes // 2
    for planned in (by_ratio, by_bytes):
        check_counts(dense, planned)
    after = dense.state_dict()
    assert list(after) == list(before) and all(torch.equal(after[key], before[key]) for key in before)


def squares_by_hand(weights, slice_shape, code_dim):
    """Squared error that a truncated SVD of all slices leaves, overhang included."""
    s_out, s_in, _, _ = slice_shape
    rows = [
        weight.detach().double()[r : r + s_out, c : c + s_in].flatten()
        for weight in weights
        for r in range(0, weight.shape[0], s_out)
        for c in range(0, weight.shape[1], s_in)
    ]
    u, s, v = torch.linalg.svd(torch.stack(rows), full_matrices=False)
    fitted = u[:, :code_dim] * s[:code_dim] @ v[:code_dim]
    return (torch.stack(rows) - fitted).square().sum().item()


def test_the_predicted_error_is_what_a_truncated_svd_leaves():
    dense = build('resnet20')
    planned = csg_seg.plan(dense, ratio=3, slice_shapes=SHAPES)
    weights = {name: each.weight for name, each in dense.named_modules() if isinstance(each, nn.Conv2d)}
    retrofitted = csg_seg.retrofit(copy.deepcopy(dense), planned.csg)
    left = 0.0
    for generator in retrofitted.csg:
        names = [name for name, each in retrofitted.named_modules() if getattr(each, 'generator', None) is generator]
        settings = generator.settings
        by_hand = squares_by_hand([weights[name] for name in names], settings.slice_shape, settings.code_dim)
        told = sum((weights[name].norm().item() * planned.layers[name]) ** 2 for name in names)
        assert told == pytest.approx(by_hand, rel=1e-5)
        left += by_hand
    whole = sum(weight.double().square().sum().item() for weight in weights.values())
    assert planned.relative_error == pytest.approx(math.sqrt(left / whole), rel=1e-5)
    nearest = min(planned.curve, key=lambda point: abs(point.stored_params - planned.stored_params))
    assert nearest.relative_error == pytest.approx(planned.relative_error, rel=0.01)


def test_a_fit_leaves_what_was_predicted():
    dense = build('odd')
    planned = csg_seg.plan(dense, ratio=1.9)
    weights = copy.deepcopy(dense.state_dict())
    errors = csg_seg.fit(csg_seg.retrofit(dense, planned.csg), weights)
    assert {name: error for name, error in planned.layers.items() if name in errors} == errors
    # Where slices overhang, the search counts zeros that the fit need not meet.
    larger = next(point for point in planned.curve if point.stored_params >= planned.stored_params)
    assert planned.relative_error < larger.relative_error


def test_more_budget_never_predicts_a_larger_error():
    dense = build('resnet20')
    plans = [csg_seg.plan(dense, ratio=ratio, slice_shapes=SHAPES) for ratio in (1.1, 2, 2.1, 4, 16)]
    errors = [each.relative_error for each in plans]
    assert errors == sorted(errors) and 0 < errors[0] < errors[-1] < 1
    curve = plans[0].curve
    assert [each.stored_params for each in curve] == sorted(each.stored_params for each in curve)
    assert [each.relative_error for each in curve] == sorted((each.relative_error for each in curve), reverse=True)
    assert (curve[-1].compression_ratio, curve[-1].relative_error) == (1.0, 0.0)
    assert trade_off(dense, slice_shapes=SHAPES) == curve


@pytest.mark.parametrize(('name', 'csg'), [('resnet20', PAPER[0]), ('resnet56', PAPER[1])])
def test_a_plan_loses_less_than_the_papers_settings_of_equal_size(name, csg):
    dense = build(name)
    fixed = predict(dense, csg)
    check_counts(dense, fixed)
    shapes = [*SHAPES, csg['slice_shape']]
    planned = csg_seg.plan(dense, params=fixed.stored_params, slice_shapes=shapes)
    assert planned.stored_params <= fixed.stored_params
    assert planned.relative_error <= fixed.relative_error


def test_slices_that_span_few_dimensions_are_recognised():
    dense = build('resnet20')
    directions = torch.randn(5, 8 * 8 * 9)
    for conv in [each for each in dense.modules() if isinstance(each, nn.Conv2d)][1:]:
        slices = torch.randn(conv.weight.numel() // 576, 5) @ directions
        conv.weight.data = join(slices.view(-1, 8, 8, 3, 3), conv.weight.shape)
    csg = dict(slice_shape=[8, 8, 3, 3], code_dim=5)
    planned = csg_seg.plan(dense, params=predict(dense, csg).stored_params, slice_shapes=SHAPES)
    assert planned.csg == [csg] and planned.compression_ratio > 30
    assert planned.relative_error < 1e-6


def test_layers_that_save_next_to_nothing_stay_dense():
    torch.manual_seed(0)
    convs = [nn.Conv2d(3, 64, 3), nn.Conv2d(64, 256, 3), nn.Conv2d(256, 256, 3), nn.Conv2d(256, 2, 1)]
    planned = csg_seg.plan(nn.Sequential(*convs), ratio=8, slice_shapes=[*SHAPES, (2, 16, 1, 1)])
    assert [error > 0 for error in planned.layers.values()] == [False, True, True, False]


def test_the_overhang_is_free():
    torch.manual_seed(0)
    dense = nn.Sequential(nn.Conv2d(3, 9, 3), nn.Conv2d(9, 9, 3, bias=False))
    csg = dict(slice_shape=(8, 8, 3, 3), code_dim=2)
    weight = dense[1].weight.detach().double()
    padded = torch.zeros(16, 16, 3, 3, dtype=torch.float64)
    padded[:9, :9] = weight
    slices = torch.stack([padded[r : r + 8, c : c + 8].flatten() for r in (0, 8) for c in (0, 8)])
    u, s, v = torch.linalg.svd(slices, full_matrices=False)
    fitted = (u[:, :2] * s[:2] @ v[:2]).view(2, 2, 8, 8, 3, 3).transpose(1, 2).reshape(16, 16, 3, 3)[:9, :9]
    assert 0 < predict(dense, csg).layers['1'] < ((weight - fitted).norm() / weight.norm()).item()


def test_given_shapes_are_tried_however_large():
    planned = csg_seg.plan(build('resnet20'), ratio=1.4, slice_shapes=[(16, 16, 3, 3)])
    assert planned.compression_ratio >= 1.4 and planned.csg[0]['slice_shape'] == [16, 16, 3, 3]


def test_the_default_device_does_not_matter():
    dense = build('resnet20')
    planned = csg_seg.plan(dense, ratio=3, slice_shapes=SHAPES[:1])
    with torch.device('meta'):
        assert csg_seg.plan(dense, ratio=3, slice_shapes=SHAPES[:1]) == planned


def test_a_conv_in_two_places_is_planned_for_once():
    torch.manual_seed(0)
    shared = nn.Conv2d(32, 32, 3)
    dense = nn.Sequential(nn.Conv2d(3, 32, 3), shared, nn.Conv2d(32, 32, 3), shared)
    planned = csg_seg.plan(dense, ratio=2, slice_shapes=SHAPES)
    assert planned.compression_ratio >= 2 and set(planned.layers) == {'0', '1', '2'}
    check_counts(dense, planned)


@pytest.mark.parametrize('budget', ['params', 'bytes'])
def test_the_smallest_size_is_named_and_can_be_reached(budget):
    dense = build('resnet20')
    with pytest.raises(CSGError, match='out of reach: the smallest this network can be is') as refusal:
        csg_seg.plan(dense, **{budget: 1}, slice_shapes=SHAPES)
    floor = int(
        re.search(rf'([\d,]+) {"parameters" if budget == "params" else "bytes"}', str(refusal.value))[1].replace(
            ',', ''
        )
    )
    smallest = csg_seg.plan(dense, **{budget: floor}, slice_shapes=SHAPES)
    assert (smallest.stored_params if budget == 'params' else smallest.stored_bytes) == floor
    with pytest.raises(CSGError, match='out of reach'):
        csg_seg.plan(dense, **{budget: floor - 1}, slice_shapes=SHAPES)
    others = [predict(dense, dict(slice_shape=shape, code_dim=1)) for shape in SHAPES[:3]]
    assert smallest.stored_params <= min(each.stored_params for each in others)


def spoilt(value):
    dense = build('resnet20')
    dense.layer2[0].conv1.weight.data[3, 2, 1, 0] = value
    return dense


@pytest.mark.parametrize(
    ('model', 'budget', 'message'),
    [
        (lambda: build('resnet20'), {}, 'exactly one budget of ratio, params and bytes; got none'),
        (lambda: build('resnet20'), {'ratio': 2, 'bytes': 9}, 'got ratio, bytes'),
        (lambda: build('resnet20'), {'ratio': 2, 'slice_shapes': [(8, 8, 5, 5)]}, 'no slice_shapes fit .* are 3x3'),
        (lambda: build('resnet20'), {'ratio': 1}, 'ratio must be a number above 1'),
        (lambda: build('resnet20'), {'ratio': math.nan}, 'ratio must be a number above 1'),
        (lambda: build('resnet20'), {'params': 0.5}, 'params must be a positive integer'),
        (lambda: build('resnet20'), {'params': 10**9}, 'already met: the network has 269,072 parameters'),
        (lambda: build('resnet20'), {'ratio': 1e6}, r'ratio=1e\+06 is out of reach: the smallest .*, \d+\.\dx'),
        (lambda: spoilt(math.nan), {'ratio': 2}, 'layer2.0.conv1: its weight holds NaN or infinity'),
        (lambda: spoilt(-math.inf), {'ratio': 2}, 'layer2.0.conv1: its weight holds NaN or infinity'),
        (lambda: csg_seg.retrofit(build('resnet20'), PAPER[0]), {'ratio': 2}, 'already retrofitted'),
        (lambda: nn.Sequential(nn.Linear(5, 5)), {'ratio': 2}, 'nothing to plan'),
    ],
)
def test_wrong_budgets_and_models_are_refused_in_one_line(model, budget, message):
    with pytest.raises(CSGError, match=message) as refusal:
        csg_seg.plan(model(), **{'slice_shapes': SHAPES[:1], **budget})
    assert '\n' not in str(refusal.value)


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    """A checkpoint that fits RESNET20."""
    path = tmp_path_factory.mktemp('plan') / 'dense.pth'
    torch.manual_seed(1)
    torch.save({'meta': {}, 'state_dict': build_model(read_config(str(RESNET20))).state_dict()}, path)
    return path


def test_the_tool_writes_a_config_that_stores_what_it_says(tmp_path, trained):
    child = tmp_path / 'mine' / 'dense.py'
    child.parent.mkdir()
    child.write_text(f"_base_ = {str(RESNET20)!r}\ncustom_imports = dict(imports=['json'])\n")
    out = tmp_path / 'plans' / 'csg.py'
    told = json.loads(
        run_tool('plan.py', child, '--checkpoint', trained, '--ratio', 3, '--out', out, '--json').stdout.splitlines()[
            -1
        ]
    )
    assert "_base_ = '../mine/dense.py'" in out.read_text() and told['trained'] is True
    cfg = Config.fromfile(out)
    summary = csg_seg.summarise(build_model(cfg))
    assert (summary.stored_params, summary.stored_bytes) == (told['stored_params'], told['stored_bytes'])
    assert summary.compression_ratio >= 3
    assert cfg.custom_imports.imports == ['json', 'csg_seg.mm']
    assert cfg.default_hooks.csg.type == 'CSGHook'
    assert out.read_text().startswith(f'# {summary.stored_params:,} parameters for {summary.dense_params:,} dense')
    again = run_tool('plan.py', child, '--ratio', 3, '--out', out, check=False)
    assert again.returncode == 1 and again.stderr.endswith('or give --overwrite\n')


@pytest.mark.parametrize(
    ('config', 'options', 'message'),
    [
        ('csg-s12-d72_' + RESNET20.name, ['--ratio', '3'], 'give the dense config'),
        (RESNET20.name, ['--ratio', '3', '--params', '1000'], 'exactly one budget'),
        (RESNET20.name, ['--ratio', '3', '--out', 'plan.txt'], 'end in .py'),
    ],
)
def test_the_tool_refuses_in_one_line(tmp_path, config, options, message):
    done = run_tool('plan.py', RESNET20.with_name(config), '--out', tmp_path / 'csg.py', *options, check=False)
    (error,) = [line for line in done.stderr.splitlines() if line.startswith('error:')]
    assert message in error and done.returncode == 1 and 'Traceback' not in done.stderr


def test_the_documented_commands_run(tmp_path, trained):
    text = (ROOT / 'docs' / 'from_trained_weights.md').read_text()
    section = text.split('## Meet a budget')[1].split('\n## ')[0]
    (block,) = re.findall(r'```sh\n(.*?)```', section, flags=re.DOTALL)
    for line in block.splitlines():
        _, tool, *args = line.replace('dense.pth', str(trained)).replace('work_dirs', str(tmp_path)).split()
        run_tool(tool.removeprefix('tools/'), *args)
    summary = csg_seg.summarise(build_model(Config.fromfile(tmp_path / 'resnet20-4x.py')))
    assert 4 <= summary.compression_ratio < 4.05
    assert (tmp_path / 'resnet20.png').read_bytes().startswith(b'\x89PNG')


def test_drawing_a_curve_needs_trained_weights(tmp_path):
    done = run_tool('report.py', RESNET20, '--curve', tmp_path / 'curve.png', check=False)
    assert done.returncode == 1 and '--curve needs trained weights; give --checkpoint' in done.stderr
    assert not any(tmp_path.iterdir())
