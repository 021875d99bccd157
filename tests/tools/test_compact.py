"""Compact checkpoints of configs: the tool, and networks of mmengine's registries built from their file alone."""

import copy
import json
import re

import numpy as np
import pytest
import torch
from conftest import ROOT, cfg_options, run_tool
from mmengine.config import Config
from mmseg.apis import inference_model

import csg_seg
from csg_seg.deploy.compact_export import compact as write_compact_file
from csg_seg.errors import CSGError
from csg_seg.mm.checkpoints.descriptions import describe
from csg_seg.mm.checkpoints.reading import load_weights, read_checkpoint
from csg_seg.mm.model import build_model
from csg_seg.running.configs import read_config
from csg_seg.storage.builders import build

DEMO = ROOT / 'configs' / 'demo' / 'csg-6x_deeplabv3_r18-d8-w32_drawn-voc-64x64.py'
CIFAR = ROOT / 'configs' / 'cifar10' / 'csg-s12-d72_resnet20_b64-20e_cifar10-npz.py'
META = {'classes': ('thing', 'other'), 'palette': [[0, 0, 0], [9, 9, 9]]}


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    """A checkpoint of the demo's config."""
    path = tmp_path_factory.mktemp('trained') / 'iter_1.pth'
    torch.manual_seed(0)
    state_dict = build_model(read_config(str(DEMO))).state_dict()
    torch.save({'meta': {'dataset_meta': META}, 'state_dict': state_dict}, path)
    return path


def compact(*args, **options):
    return run_tool('compact.py', *args, **options)


def header_of(path):
    content = path.read_bytes()
    return json.loads(content[8 : 8 + int.from_bytes(content[:8], 'little')])['__metadata__']


def test_the_tools_file_is_enough_by_itself(trained, drawn, tmp_path):
    out = tmp_path / 'small.safetensors'
    options = ['--dtype', 'int8', '--images', 3, *cfg_options({'test_dataloader.dataset.data_root': drawn})]
    told = json.loads(compact(DEMO, trained, '--out', out, *options, '--json').stdout.splitlines()[-1])
    assert 0 < told['logit_error'] < 0.05 * told['logit_size']
    assert told['compact_bytes'] == out.stat().st_size
    assert told['compression_ratio'] == told['dense_bytes'] / told['compact_bytes']
    cfg = read_config(str(DEMO))
    model = build_model(cfg).eval()
    assert told['dense_bytes'] == csg_seg.summarise(model).dense_bytes
    load_weights(model, read_checkpoint(trained)['state_dict'])
    loaded = csg_seg.load_compact(out).eval()
    image = np.random.default_rng(0).integers(0, 255, (70, 90, 3), dtype=np.uint8)
    loaded.dataset_meta = META
    segmented = inference_model(loaded, image)
    assert segmented.pred_sem_seg.data.shape[1:] == (70, 90)
    x = torch.randn(1, 3, 80, 80, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        exact, near = model(x), loaded(x)
    assert 0 < (near - exact).abs().mean() < 0.05 * exact.abs().mean()
    header = header_of(out)
    assert json.loads(header['dataset_meta'])['classes'] == list(META['classes'])
    assert set(json.loads(header['versions'])) == {'csg_seg', 'torch', 'mmengine'}


def test_an_update_is_used_by_every_tool_from_beside_its_base(trained, drawn, tmp_path):
    base, update = tmp_path / 'base.safetensors', tmp_path / 'customer' / 'update.safetensors'
    update.parent.mkdir()
    write_compact_file(read_config(str(DEMO)), trained, base, dtype='int8')
    content = torch.load(trained, weights_only=False)
    for name, tensor in content['state_dict'].items():
        if name.endswith('.code'):
            tensor += 0.01
    codes = sum(tensor.numel() for name, tensor in content['state_dict'].items() if name.endswith('.code'))
    later = tmp_path / 'later.pth'
    torch.save(content, later)
    options = ['--base', base, '--images', 1, *cfg_options({'test_dataloader.dataset.data_root': drawn})]
    told = json.loads(compact(DEMO, later, '--out', update, *options, '--json').stdout.splitlines()[-1])
    assert told['dtype'] == 'int8' and told['compact_bytes'] == update.stat().st_size < base.stat().st_size
    assert codes < told['compact_bytes'] < 1.1 * codes  # int8: a byte for each value, and a header
    image = drawn / 'JPEGImages' / 'val_00000.jpg'
    done = run_tool('demo.py', image, update, '--out', tmp_path / 'seen.png', check=False)
    assert done.returncode == 1 and 'an update of base.safetensors' in done.stderr and 'copy that file' in done.stderr
    update.rename(tmp_path / update.name)
    seen = {}
    for options in ((), ('--low-memory',)):
        printed = run_tool(
            'demo.py', image, tmp_path / update.name, '--out', tmp_path / f'{options}.png', '--json', *options
        )
        seen[options] = json.loads(printed.stdout)
    first, second = seen.values()
    assert first == pytest.approx(second, abs=0.5)


@pytest.mark.full
@pytest.mark.parametrize('updates', [False, True])
def test_the_tool_tests_both_files(trained, drawn, tmp_path, updates):
    options = ['--dtype', 'int8', '--test', 'mIoU', *cfg_options({'test_dataloader.dataset.data_root': drawn})]
    if updates:
        base = tmp_path / 'elsewhere' / 'base.safetensors'
        base.parent.mkdir()
        write_compact_file(read_config(str(DEMO)), trained, base)
        options += ['--base', base]
    printed = compact(DEMO, trained, '--out', tmp_path / 'small.safetensors', *options, '--json').stdout
    told = json.loads(printed.splitlines()[-1])
    # Of untrained weights, where a class more or less is found by chance.
    assert 0 < told['score'] < 10 and told['compact_score'] == pytest.approx(told['score'], abs=1)


def test_a_file_that_is_not_smaller_is_not_left(tmp_path):
    # Codes of a binary generator as long as their slices: nothing is saved.
    config, checkpoint = tmp_path / 'large.py', tmp_path / 'large.pth'
    csg = dict(slice_shape=(16, 16, 3, 3), code_dim=2300, include=['backbone.layer4.1.conv2'], generator='binary')
    config.write_text(f'_base_ = {str(DEMO)!r}\nmodel = dict(csg=dict(_delete_=True, **{csg!r}))\n')
    torch.save({'state_dict': build_model(Config.fromfile(config)).state_dict()}, checkpoint)
    done = compact(config, checkpoint, '--out', tmp_path / 'x.safetensors', check=False)
    assert done.returncode == 1 and 'the dense network has' in done.stderr.splitlines()[-1]
    assert sorted(path.name for path in tmp_path.iterdir()) == ['large.pth', 'large.py']


@pytest.mark.parametrize(
    ('config', 'options', 'says'),
    [
        (DEMO, ['--out', 'x.pth'], 'end in .safetensors'),
        (DEMO.with_name(DEMO.name.removeprefix('csg-6x_')), ['--out', 'x.safetensors'], 'give a CSG config'),
        (CIFAR, ['--out', 'x.safetensors'], 'the checkpoint'),
    ],
)
def test_mistakes_are_named_and_leave_nothing(trained, tmp_path, config, options, says):
    done = compact(config, trained, options[0], tmp_path / options[1], check=False)
    (error,) = [line for line in done.stderr.splitlines() if line.startswith('error:')]
    assert done.returncode == 1 and says in error and not list(tmp_path.iterdir())


@pytest.mark.full
@pytest.mark.parametrize(
    ('name', 'network', 'dtype'),
    [
        ('r50-d8_4xb4-20k_voc12-512x512', 'DeepLabV3-R50', 'float32'),
        ('r50-d8_4xb4-20k_voc12-512x512', 'DeepLabV3-R50', 'float16'),
        ('r50-d8_4xb4-20k_voc12-512x512', 'DeepLabV3-R50', 'int8'),
        ('r18-d8_1xb4-1k_camvid-144x192', 'DeepLabV3-R18', 'int8'),
    ],
)
def test_deeplabv3_shrinks_as_the_documents_say(tmp_path, name, network, dtype):
    cfg = read_config(str(ROOT / 'configs' / 'deeplabv3' / f'csg-s16-d128_deeplabv3_{name}.py'))
    torch.save({'state_dict': build_model(cfg).state_dict()}, tmp_path / 'x.pth')
    found = write_compact_file(cfg, tmp_path / 'x.pth', tmp_path / 'x.safetensors', dtype=dtype)
    table = (ROOT / 'docs' / 'deploy.md').read_text().partition(f'| {network}, s16 d128')[2]
    dense, small, ratio = re.search(rf'\| {dtype} \| (\S+) MB \| (\S+) MB \| (\S+)x', table).groups()
    assert (dense, small) == tuple(f'{found[key] / 1e6:.1f}' for key in ('dense_bytes', 'compact_bytes'))
    assert found['compression_ratio'] == pytest.approx(float(ratio), abs=0.01 if network == 'DeepLabV3-R50' else 0.1)


def test_a_pipeline_that_names_a_file_is_no_source():
    cfg = read_config(str(DEMO))
    cfg.test_pipeline.append(dict(type='LoadAnnotations', backend_args=dict(path='/data/x')))
    with pytest.raises(CSGError, match='may name a file or an address'):
        describe(cfg)


def test_a_classifier_too(tmp_path):
    cfg = read_config(str(CIFAR))
    model = build_model(cfg).eval()
    csg_seg.save_compact(model, tmp_path / 'x.safetensors', source=describe(cfg))
    loaded = csg_seg.load_compact(tmp_path / 'x.safetensors').eval()
    x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(loaded(x)[0], model(x)[0])


def put(source, place, value):
    changed = copy.deepcopy(source)
    *steps, last = place
    inner = changed
    for step in steps:
        inner = inner[step]
    inner[last] = value
    return changed


@pytest.mark.parametrize(
    ('place', 'value', 'says'),
    [
        (['scope'], 'os', "no scope 'os'"),
        (['model', 'type'], 'os.system', "type 'os.system' is not registered"),
        (['model', 'type'], 'antigravity', "type 'antigravity' is not registered"),
        (['model', 'backbone', 'type'], 'builtins.eval', "type 'builtins.eval' is not registered"),
        (['model', 'decode_head', 'norm_cfg'], {'type': 'torch.load'}, "type 'torch.load' is not registered"),
        (['model', 'backbone', 'type'], 7, "type '7' is not registered"),
        (['model', 'backbone', 'path'], '/etc/passwd', 'may name a file or an address'),
        (['model', 'backbone', 'weights'], 'https://example.org/x.pth', 'may name a file or an address'),
        (['model', 'backbone', 'depth'], 19, "'mmengine' cannot build the network"),
        (['test_pipeline', 0, 'type'], 'subprocess.run', "type 'subprocess.run' is not registered"),
    ],
)
def test_a_source_runs_nothing_that_is_not_registered(place, value, says):
    source = describe(read_config(str(DEMO)))
    with pytest.raises(CSGError, match=says):
        build(put(source, place, value))


def test_the_pipeline_of_the_test_data_is_described_too():
    cfg = read_config(str(DEMO))
    pipeline = [dict(each) for each in cfg.test_pipeline]
    cfg.test_dataloader.dataset = dict(type='RepeatDataset', times=1, dataset=dict(pipeline=cfg.pop('test_pipeline')))
    assert describe(cfg)['test_pipeline'] == pipeline
    cfg.test_dataloader = None
    assert 'test_pipeline' not in describe(cfg)


def test_weights_are_never_fetched():
    cfg = read_config(str(DEMO))
    cfg.model.backbone.init_cfg = dict(type='Pretrained', checkpoint='torchvision://resnet18')
    cfg.model.pretrained = 'open-mmlab://resnet18_v1c'
    source = describe(cfg)
    assert 'resnet18_v1c' not in json.dumps(source) and 'torchvision:' not in json.dumps(source)
    network = build(source)
    assert network.backbone.init_cfg is None or 'checkpoint' not in str(network.backbone.init_cfg)
