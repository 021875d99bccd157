"""Networks as ONNX and torch.export programs."""

import json

import mmcv
import numpy as np
import onnx
import pytest
import torch
from conftest import ROOT, run_tool

import csg_seg
from csg_seg.errors import CSGError
from csg_seg.mm.compact import write_described
from csg_seg.mm.export import Scores, export_onnx, max_difference
from csg_seg.mm.launch import read_config
from csg_seg.mm.model import build_model

DEMO = ROOT / 'configs' / 'demo' / 'csg-s16-d128_deeplabv3_r18-d8-w32_drawn-voc-80x80.py'
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


@pytest.mark.parametrize('config', [DEMO, CIFAR])
def test_plain_and_generated_files_score_as_torch_does_at_any_size(config, tmp_path):
    model = network(config)
    with torch.no_grad():
        wanted = [Scores(model)(image) for image in images()]
    found = {}
    for name in ('generated', 'plain'):
        found[name] = export_onnx(model, tmp_path / name, images())
        difference = max_difference(tmp_path / name, images(), wanted)
        assert found[name]['max_difference'] < 1e-4 and difference < 1e-4
        assert onnx.load(tmp_path / name).graph.input[0].type.tensor_type.shape.dim[2].dim_param
        csg_seg.materialise(model) if name == 'generated' else None
    stored = {name: each['bytes'] for name, each in found.items()}
    assert stored['generated'] < 0.6 * stored['plain']


def test_the_file_says_how_images_are_prepared(tmp_path):
    export_onnx(network(DEMO), tmp_path / 'x.onnx', images()[:1])
    says = metadata(tmp_path / 'x.onnx')
    assert says['channels'] == 'RGB' and says['classes'] == ['one', 'two']
    preprocessor = read_config(str(DEMO)).model.data_preprocessor
    assert says['mean'] == pytest.approx(preprocessor.mean) and says['std'] == pytest.approx(preprocessor.std)


def test_labels_are_the_best_scores(tmp_path):
    model = network(DEMO)
    found = export_onnx(model, tmp_path / 'x.onnx', images(), labels=True)
    assert found['max_difference'] < 1e-4
    with torch.no_grad():
        worst = -Scores(model)(images()[0])
    assert max_difference(tmp_path / 'x.onnx', images()[:1], [worst]) > 1e-2


def test_half_precision_is_half_as_large_and_said_to_differ(tmp_path):
    model = csg_seg.materialise(network(DEMO))
    single = export_onnx(model, tmp_path / 'single.onnx', images())
    half = export_onnx(model, tmp_path / 'half.onnx', images(), dtype='float16')
    assert half['bytes'] < 0.6 * single['bytes']
    assert single['max_difference'] < half['max_difference'] < 0.1
    assert next(model.parameters()).dtype == torch.float32


def test_a_file_that_computes_something_else_is_not_left(tmp_path, monkeypatch):
    monkeypatch.setattr('csg_seg.mm.export.LIMIT', -1.0)
    with pytest.raises(CSGError, match='onnxruntime and torch differ by'):
        export_onnx(network(CIFAR), tmp_path / 'x.onnx', images())
    assert not list(tmp_path.iterdir())


def test_torch_export_keeps_the_scores_of_plain_and_generated_networks(tmp_path):
    model = network(DEMO)
    wrapped = Scores(model).eval()
    free = {'image': {2: torch.export.Dim.DYNAMIC, 3: torch.export.Dim.DYNAMIC}}
    first, second = images([(1, 80, 80), (1, 57, 131)])
    with torch.no_grad():
        wanted = wrapped(second)
        for name in ('generated', 'plain'):
            program = torch.export.export(wrapped, (first,), dynamic_shapes=free)
            torch.export.save(program, tmp_path / f'{name}.pt2')
            loaded = torch.export.load(tmp_path / f'{name}.pt2').module()
            torch.testing.assert_close(loaded(second), wanted, rtol=1e-4, atol=1e-5)
            csg_seg.materialise(model) if name == 'generated' else None


def test_the_tool_needs_only_a_compact_file(tmp_path):
    model = network(DEMO)
    write_described(model, model.state_dict(), tmp_path / 'x.safetensors', model.cfg, model.dataset_meta)
    picture = np.random.default_rng(0).integers(0, 255, (70, 90, 3), dtype=np.uint8)
    mmcv.imwrite(picture, str(tmp_path / 'image.png'))
    args = [tmp_path / 'x.safetensors', '--images', tmp_path / 'image.png', '--out', tmp_path / 'x.onnx']
    found = json.loads(run_tool('export_onnx.py', *args, '--json').stdout.splitlines()[-1])
    assert found['max_difference'] < 1e-4 and found['bytes'] == (tmp_path / 'x.onnx').stat().st_size
    again = run_tool('export_onnx.py', *args, check=False)
    assert again.returncode == 1 and 'give --overwrite' in again.stderr.splitlines()[-1]
