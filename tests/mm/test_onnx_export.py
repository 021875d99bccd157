"""Networks as ONNX and torch.export programs."""

import json

import mmcv
import numpy as np
import onnx
import pytest
import torch
from conftest import ROOT, run_tool

import csg_seg
from csg_seg.deploy.inference import channel_order
from csg_seg.deploy.onnx_export import Scores, export_onnx, max_difference
from csg_seg.errors import CSGError
from csg_seg.mm.checkpoints.writing import write_with_config
from csg_seg.mm.model import build_model
from csg_seg.running.configs import read_config

DEMO = ROOT / 'configs' / 'demo' / 'csg-6x_deeplabv3_r18-d8-w32_drawn-voc-64x64.py'
CIFAR = ROOT / 'configs' / 'cifar10' / 'csg-s12-d72_resnet20_b64-20e_cifar10-npz.py'
SIZES = [(1, 80, 80), (2, 57, 131)]


def network(config):
    torch.manual_seed(0)
    cfg = read_config(str(config))
    built = build_model(cfg).eval()
    built.cfg, built.dataset_meta = cfg, {'classes': ('one', 'two'), 'palette': [[0, 0, 0], [9, 9, 9]]}
    return built


def images(sizes=SIZES):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(batch, 3, *size, generator=generator) for batch, *size in sizes]


def metadata(path):
    return {each.key: json.loads(each.value) for each in onnx.load(path).metadata_props}


@pytest.fixture(scope='module')
def exported(tmp_path_factory):
    """A segmentor's scores by torch, and its files: with codes and generators, and plain."""
    folder, model = tmp_path_factory.mktemp('onnx'), network(DEMO)
    with torch.no_grad():
        wanted = [Scores(model)(image) for image in images()]
    found = {'generated': export_onnx(model, folder / 'generated', images())}
    model.data_preprocessor.test_cfg = {'size_divisor': 32}
    found['plain'] = export_onnx(csg_seg.materialise(model), folder / 'plain', images())
    return wanted, folder, found


@pytest.mark.parametrize('name', ['generated', 'plain'])
def test_files_score_as_torch_does_at_any_size(name, exported):
    wanted, folder, found = exported
    assert found[name]['max_difference'] < 1e-4
    assert max_difference(folder / name, images(), wanted) < 1e-4
    assert max_difference(folder / name, images(), [wanted[0] + 1, wanted[1]]) == pytest.approx(1, rel=1e-3)


def test_a_generated_networks_file_is_smaller(exported):
    _, _, found = exported
    assert found['generated']['bytes'] < 0.6 * found['plain']['bytes']


def test_the_file_says_how_images_are_prepared(exported):
    _, folder, _ = exported
    says = metadata(folder / 'plain')
    assert says['channels'] == 'RGB' and says['classes'] == ['one', 'two']
    preprocessor = read_config(str(DEMO)).model.data_preprocessor
    assert says['mean'] == pytest.approx(preprocessor.mean) and says['std'] == pytest.approx(preprocessor.std)


def test_the_file_says_how_images_are_padded(exported):
    _, folder, _ = exported
    assert 'padding' not in metadata(folder / 'generated')
    assert metadata(folder / 'plain')['padding'] == {'size_divisor': 32, 'value': 0}


def test_the_order_of_channels_does_not_depend_on_scopes():
    network = build_model(read_config(str(DEMO)))
    network.cfg = read_config(str(DEMO))
    (loader, *others) = network.cfg.test_pipeline
    assert loader.type == 'LoadImageFromFile' and channel_order(network) == 'RGB'
    network.cfg.test_pipeline = [{**loader, 'type': 'mmcv.LoadImageFromFile'}, *others]
    assert channel_order(network) == 'RGB'


def test_the_file_does_not_name_code_of_this_machine(exported):
    _, folder, _ = exported
    for name in ('plain', 'generated'):
        assert b'.py' not in (folder / name).read_bytes(), name


def test_a_file_that_computes_something_else_is_not_left(exported, tmp_path, monkeypatch):
    _, folder, _ = exported
    monkeypatch.setattr('csg_seg.deploy.onnx_export._exported', lambda *_: onnx.load(folder / 'plain'))
    other = network(DEMO)
    other.decode_head.conv_seg.bias.data += 1
    with pytest.raises(CSGError, match='onnxruntime and torch differ by 1'):
        export_onnx(other, tmp_path / 'x.onnx', images())
    assert not list(tmp_path.iterdir())


def test_a_network_of_one_score_has_no_labels_to_export(tmp_path):
    cfg = read_config(str(DEMO))
    loss = dict(type='CrossEntropyLoss', use_sigmoid=True)
    cfg.model.decode_head.update(num_classes=2, out_channels=1, threshold=0.3, loss_decode=loss)
    with pytest.raises(CSGError, match='export scores, not labels'):
        export_onnx(build_model(cfg).eval(), tmp_path / 'x.onnx', images(), labels=True)


@pytest.mark.full
def test_half_precision_is_half_as_large_and_said_to_differ(exported, tmp_path):
    _, _, found = exported
    model = csg_seg.materialise(network(DEMO))
    before = model.state_dict()['backbone.layer1.0.conv1.weight'].clone()
    half = export_onnx(model, tmp_path / 'half.onnx', images(), dtype='float16')
    assert half['bytes'] < 0.6 * found['plain']['bytes']
    assert found['plain']['max_difference'] < half['max_difference'] < 0.1
    assert next(model.parameters()).dtype == torch.float32
    assert torch.equal(model.state_dict()['backbone.layer1.0.conv1.weight'], before)


def test_torch_export_keeps_the_scores_of_plain_and_generated_networks(tmp_path):
    model = network(DEMO)
    wrapped = Scores(model).eval()
    free = {'image': {2: torch.export.Dim.DYNAMIC, 3: torch.export.Dim.DYNAMIC}}
    first, second = images([(1, 80, 80), (1, 64, 144)])
    with torch.no_grad():
        wanted = wrapped(second)
        for name in ('generated', 'plain'):
            program = torch.export.export(wrapped, (first,), dynamic_shapes=free)
            torch.export.save(program, tmp_path / f'{name}.pt2')
            loaded = torch.export.load(tmp_path / f'{name}.pt2').module()
            torch.testing.assert_close(loaded(second), wanted, rtol=1e-4, atol=1e-5)
            csg_seg.materialise(model) if name == 'generated' else None


def test_the_tool_needs_only_a_compact_file_and_can_give_labels(tmp_path):
    model = network(CIFAR)
    write_with_config(model, model.state_dict(), tmp_path / 'x.safetensors', model.cfg, model.dataset_meta)
    picture = np.random.default_rng(0).integers(0, 255, (32, 32, 3), dtype=np.uint8)
    mmcv.imwrite(picture, str(tmp_path / 'image.png'))
    args = [tmp_path / 'x.safetensors', '--images', tmp_path / 'image.png', '--out', tmp_path / 'x.onnx', '--labels']
    found = json.loads(run_tool('export_onnx.py', *args, '--json').stdout.splitlines()[-1])
    assert found['max_difference'] < 1e-4 and found['bytes'] == (tmp_path / 'x.onnx').stat().st_size
    with torch.no_grad():
        worst = -Scores(model)(images()[0])
    assert max_difference(tmp_path / 'x.onnx', images()[:1], [worst]) > 1e-2
    again = run_tool('export_onnx.py', *args, check=False)
    assert again.returncode == 1 and 'give --overwrite' in again.stderr.splitlines()[-1]
