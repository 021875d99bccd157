"""What README and docs tell users to type works."""

import re
import runpy
import shutil
import subprocess
import sys
from argparse import ArgumentParser
from collections import OrderedDict
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import mmseg
import numpy as np
import pytest
import torch
import torchvision
from conftest import ROOT, cfg_options, run_program, run_tool
from mmengine.config import Config
from torch import nn

import csg_seg
from csg_seg.mm.checkpoints.reading import read_checkpoint
from csg_seg.mm.model import build_model
from experiments import tables
from experiments.table_contents import EXPERIMENTS as DESCRIBED

README = (ROOT / 'README.md').read_text()
MMSEG = (ROOT / 'docs' / 'mmseg_config.md').read_text()
DOCUMENTS = [ROOT / 'CONTRIBUTING.md', *tables.documents()]
EXPERIMENTS = sorted(path.parent.name for path in (ROOT / 'experiments').glob('*/__main__.py'))


def blocks(document: str, language: str) -> list[str]:
    return re.findall(rf'```{language}\n(.*?)```', document, flags=re.DOTALL)


def test_three_lines_make_a_config(tmp_path):
    (lines,) = [block for block in blocks(README, 'python') if 'base_type' in block]
    assert lines in blocks(MMSEG, 'python') and len(lines.splitlines()) == 3
    (tmp_path / 'mine.py').write_text(lines)
    printed = run_program(sys.executable, ROOT / 'tools' / 'report.py', tmp_path / 'mine.py').stdout
    assert '68,114,570 dense: 4.00x smaller' in printed
    assert '68.11 M dense, 4.00x smaller' in MMSEG


def test_hook_lines_make_a_config(tmp_path):
    (line,) = [block for block in blocks(MMSEG, 'python') if 'default_hooks' in block]
    (tmp_path / 'hook.py').write_text("_base_ = 'mmseg::pspnet/pspnet_r50-d8_4xb4-40k_voc12aug-512x512.py'\n" + line)
    assert Config.fromfile(tmp_path / 'hook.py').default_hooks.csg.csg == dict(ratio=4)


def test_plain_pytorch_example_runs(tmp_path):
    (example,) = [block for block in blocks(README, 'python') if 'import torchvision' in block]
    (printed,) = blocks(README, 'text')
    done = subprocess.run([sys.executable, '-c', example], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == printed
    assert f'{(tmp_path / "small.safetensors").stat().st_size / 1e6:.1f} MB' in README


def test_a_network_of_several_kernels_is_retrofitted_as_the_page_says(capsys):
    text = (ROOT / 'docs' / 'supported.md').read_text()
    (example,) = re.findall(r'```python\n(.*?)```', text, flags=re.DOTALL)
    exec(example, {})
    printed = capsys.readouterr().out
    assert "left dense, the network's first conv: features.0.0\n" in printed and printed.count('left dense') == 1


@pytest.mark.parametrize('document', DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_named_files_exist(document):
    text = document.read_text()
    links = re.findall(r'\]\((?!http)([^)#]+)\)', text)
    names = re.findall(r'(?:tools|configs|docs|tests|csg_seg|experiments)/[\w/.-]*\w', text)
    folder = document.parent
    missing = [link for link in links if not (folder / link).exists()]
    missing += [name for name in names if not (ROOT / name).exists() and 'dataset_converters/voc_aug' not in name]
    assert not missing


class OptionsFoundError(Exception):
    """Ends a tool when its parser has all options."""


@pytest.fixture
def options_of(monkeypatch):
    """Return the options of a tool or experiment, given its function ``parse_args``."""

    def stop(parser):
        raise OptionsFoundError(*parser._option_string_actions)

    def call(parse_args):
        with pytest.raises(OptionsFoundError) as found:
            parse_args()
        return set(found.value.args)

    monkeypatch.setattr(ArgumentParser, 'parse_args', stop)
    return call


@pytest.mark.parametrize('tool', ['train.py', 'test.py'])
def test_options_of_the_tools_are_mmsegs(tool, options_of):
    ours = options_of(runpy.run_path(str(ROOT / 'tools' / tool))['parse_args'])
    theirs = (Path(mmseg.__file__).parent / '.mim' / 'tools' / tool).read_text()
    options = set(re.findall(r"'(--[\w-]+)'", theirs))
    assert options
    assert options <= ours


def commands_of_experiments():
    """The name and the rest of each ``python -m experiments.NAME`` in the documents."""
    for document in DOCUMENTS:
        text = document.read_text().replace('\\\n', ' ')
        yield from re.findall(r'python -m experiments\.([A-Za-z_]+)([^\n`]*)', text)


@pytest.mark.parametrize('name', EXPERIMENTS)
def test_commands_of_experiments_have_only_options_that_exist(name, options_of):
    given = [re.findall(r'--[\w-]+', rest) for found, rest in commands_of_experiments() if found == name]
    assert given
    assert set().union(*given) <= options_of(import_module(f'experiments.{name}.__main__').parse_args)


def test_every_experiment_of_a_command_and_of_the_table_exists():
    assert {name for name, _ in commands_of_experiments()} - {'NAME', 'tables'} == {*EXPERIMENTS}
    assert sorted(DESCRIBED) == EXPERIMENTS


@pytest.fixture
def recipes():
    """The configs of docs/from_trained_weights.md: for a classifier, and for a segmentation network."""
    text = (ROOT / 'docs' / 'from_trained_weights.md').read_text()
    return [
        block for block in re.findall(r'```python\n(.*?)```', text, flags=re.DOTALL) if "_base_ = './small.py'" in block
    ]


@pytest.mark.full
def test_the_recipes_from_trained_weights_train(recipes, drawn, tmp_path):
    classifier, segmentor = recipes
    deeplab = ROOT / 'configs' / 'demo' / 'deeplabv3_r18-d8-w32_drawn-voc-64x64.py'
    resnet20 = ROOT / 'configs' / 'cifar10' / 'resnet20_b64-20e_cifar10-npz.py'
    rng = np.random.default_rng(0)
    images = {f'x_{split}': rng.integers(0, 255, (8, 32, 32, 3), dtype=np.uint8) for split in ('train', 'test')}
    np.savez(tmp_path / 'cifar10-subset.npz', **images, **{f'y_{split}': np.arange(8) for split in ('train', 'test')})
    loaders = ('train_dataloader', 'val_dataloader', 'test_dataloader')
    for recipe, dense, data, one_step in (
        (classifier, resnet20, tmp_path, {'train_cfg.max_epochs': 1}),
        (segmentor, deeplab, drawn, {'train_cfg.max_iters': 1, 'train_cfg.val_interval': 1}),
    ):
        folder = tmp_path / dense.stem
        folder.mkdir()
        torch.save({'state_dict': build_model(Config.fromfile(dense)).state_dict()}, folder / 'dense.pth')
        plan = ['plan.py', dense, '--checkpoint', folder / 'dense.pth', '--ratio', 2.3, '--out', folder / 'small.py']
        run_tool(*plan)
        (folder / 'taught.py').write_text(recipe.replace('dense.pth', str(folder / 'dense.pth')))
        options = one_step | {f'{loader}.dataset.data_root': data for loader in loaders}
        run_tool('train.py', folder / 'taught.py', '--work-dir', folder, *cfg_options(options))
        assert list(folder.glob('*_1.pth'))


def example(document: str, marker: str) -> str:
    text = (ROOT / 'docs' / document).read_text()
    (found,) = [block for block in re.findall(r'```python\n(.*?)```', text, flags=re.DOTALL) if marker in block]
    return found


@pytest.mark.parametrize('dtype', ['float32', 'float16', 'int8'])
def test_a_compact_file_is_read_without_the_package_as_the_page_does(dtype, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    settings = [{'slice_shape': (12, 20, 3, 3), 'code_dim': 40}, {'slice_shape': (16, 16, 1, 1), 'code_dim': 16}]
    model = csg_seg.retrofit(torchvision.models.resnet18(weights=None), settings)
    csg_seg.save_compact(model, 'small.safetensors', dtype=dtype)
    loaded = csg_seg.load_compact('small.safetensors', torchvision.models.resnet18(weights=None))
    page = {}
    exec(example('formats.md', 'safe_open'), page)
    assert 'csg_seg' not in example('formats.md', 'safe_open') and page['layers']
    for name in page['layers']:
        weight = loaded.get_submodule(name).weight.detach()
        torch.testing.assert_close(torch.from_numpy(page['rebuild'](name)), weight, rtol=1e-5, atol=1e-5)


def test_the_recipe_for_other_classes_trains(drawn, tmp_path):
    demo = ROOT / 'configs' / 'demo' / 'csg-6x_deeplabv3_r18-d8-w32_drawn-voc-64x64.py'
    heads = "dict(slice_shape=(16, 16, 1, 1), code_dim=16, include=['*.conv_seg'])"
    any_classes = 'dict(loss_decode=dict(class_weight=None))'
    csg = f'csg=[dict(slice_shape=(16, 16, 3, 3), code_dim=128), {heads}]'
    csg = f'model = dict({csg}, decode_head={any_classes}, auxiliary_head={any_classes})\n'
    (tmp_path / 'my_csg_config.py').write_text(f'_base_ = {str(demo)!r}\n{csg}')
    recipe = example('from_trained_weights.md', "_base_ = './my_csg_config.py'")
    (tmp_path / 'other.py').write_text(recipe.replace('trained.pth', str(tmp_path / 'trained' / 'iter_1.pth')))
    loaders = ('train_dataloader', 'val_dataloader', 'test_dataloader')
    options = {'train_cfg.max_iters': 1, 'train_cfg.val_interval': 1}
    options |= {f'{loader}.dataset.data_root': drawn for loader in loaders}
    train = ['--work-dir', tmp_path / 'trained', *cfg_options(options)]
    run_tool('train.py', tmp_path / 'my_csg_config.py', *train)
    done = run_tool('train.py', tmp_path / 'other.py', *train[:1], tmp_path / 'other', *train[2:])
    assert 'does not fit decode_head.conv_seg, auxiliary_head.conv_seg' in done.stdout + done.stderr
    assert len(read_checkpoint(tmp_path / 'other' / 'iter_1.pth')['state_dict']['decode_head.conv_seg.bias']) == 4


def test_the_example_for_other_classes_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def network(num_classes):
        features = [nn.Conv2d(3, 64, 3), nn.ReLU(), nn.Conv2d(64, 64, 3)]
        return nn.Sequential(OrderedDict(features=nn.Sequential(*features), classifier=nn.Conv2d(64, num_classes, 3)))

    csg = dict(slice_shape=(16, 16, 3, 3), code_dim=8)
    torch.save(csg_seg.retrofit(network(10), csg).state_dict(), 'trained.pth')
    names = dict(torch=torch, csg_seg=csg_seg, build=network, csg=csg)
    exec(example('plain_pytorch.md', "reset=['classifier']"), names)
    assert names['fresh'] == ('classifier',)


def test_the_page_of_many_networks_is_true_of_plain_pytorch(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    page, source = 'many_networks.md', dict(builder='torchvision', name='resnet18', num_classes=4)

    def network(seed):
        torch.manual_seed(seed)
        csg = dict(slice_shape=(16, 16, 3, 3), code_dim=16)
        return csg_seg.retrofit(torchvision.models.resnet18(num_classes=4), csg)

    base = network(0)
    csg_seg.save_compact(base, 'base.safetensors', source=source)
    names = dict(csg_seg=csg_seg, model=network(0))
    exec(example(page, 'train_only(model'), names)
    wanted = {}
    for site in (7, 8):
        with torch.no_grad():
            for parameter in names['model'].parameters():
                if parameter.requires_grad:
                    parameter.add_(0.01)
        exec(example(page, 'save_compact(').replace('site-7', f'site-{site}'), names)
        wanted[site] = {name: tensor.clone() for name, tensor in names['model'].state_dict().items()}
    assert Path('site-7.safetensors').stat().st_size < 0.7 * Path('base.safetensors').stat().st_size
    Path('elsewhere').mkdir()
    shutil.copy('site-7.safetensors', 'elsewhere')
    exec(example(page, 'elsewhere/'), names)
    exec(example(page, 'share_generators'), names)
    for model, state_dict in zip([names['model'], *names['models']], (wanted[7], wanted[7], wanted[8]), strict=True):
        assert all(torch.equal(tensor, state_dict[name]) for name, tensor in model.state_dict().items())
    assert names['models'][0].csg[0] is names['models'][1].csg[0]


def test_a_variant_that_trains_codes_differs_from_its_base_in_codes(drawn, tmp_path):
    demo = ROOT / 'configs' / 'demo' / 'csg-6x_deeplabv3_r18-d8-w32_drawn-voc-64x64.py'
    (tmp_path / 'my_csg_config.py').write_text(f'_base_ = {str(demo)!r}\n')
    recipe = example('many_networks.md', "_base_ = './my_csg_config.py'")
    trained = tmp_path / 'base' / 'iter_2.pth'
    (tmp_path / 'variant.py').write_text(recipe.replace('work_dirs/base/iter_20000.pth', str(trained)))
    loaders = ('train_dataloader', 'val_dataloader', 'test_dataloader')
    options = {'train_cfg.max_iters': 2, 'train_cfg.val_interval': 3, 'default_hooks.checkpoint.interval': 2}
    options |= {f'{loader}.dataset.data_root': drawn for loader in loaders}
    for name, config in (('base', 'my_csg_config.py'), ('variant', 'variant.py')):
        run_tool('train.py', tmp_path / config, '--work-dir', tmp_path / name, *cfg_options(options))
    base, variant = (read_checkpoint(tmp_path / name / 'iter_2.pth')['state_dict'] for name in ('base', 'variant'))
    changed = {name for name, tensor in variant.items() if not torch.equal(tensor, base[name])}
    assert changed == {name for name in base if name.endswith('.code')}


def test_the_example_of_gradient_accumulation_runs():
    torch.manual_seed(0)
    model = csg_seg.retrofit(
        nn.Sequential(nn.Conv2d(3, 16, 3), nn.Conv2d(16, 32, 3)), dict(slice_shape=(16, 16, 3, 3), code_dim=8)
    )
    batches = [(torch.randn(2, 3, 9, 9), torch.randn(2, 32, 5, 5)) for _ in range(3)]
    before = model[1].code.clone()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    exec(
        example('speed.md', 'csg.accumulate'),
        dict(model=model, batches=batches, loss=nn.MSELoss(), optimizer=optimizer),
    )
    assert not torch.equal(model[1].code, before)


def test_the_example_of_a_teacher_goes_from_a_trained_network_to_a_compact_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    images = torch.randn(32, 3, 32, 32)
    dense = torchvision.models.resnet18(num_classes=4)
    dense(images)  # running statistics of these images
    labels = dense.eval()(images).argmax(1)
    batches = [(images[start : start + 8], labels[start : start + 8]) for start in range(0, 32, 8)]
    names = dict(trained_network=lambda: dense, criterion=lambda scores, labels: 0 * scores.sum(), loader=10 * batches)
    exec(example('from_trained_weights.md', 'csg_seg.Teacher('), names)
    fitted = csg_seg.retrofit(
        torchvision.models.resnet18(num_classes=4), dict(slice_shape=(16, 16, 3, 3), code_dim=128)
    )
    csg_seg.fit(fitted, dense.state_dict())
    loaded = csg_seg.load_compact('student.safetensors', torchvision.models.resnet18(num_classes=4))
    with torch.no_grad():
        wanted = dense(images)
        before, after = ((each.eval()(images) - wanted).square().mean() for each in (fitted, loaded))
    assert after < 0.5 * before


def test_a_plain_network_is_deployed_as_the_page_does(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    page = example('deploy.md', 'torch.onnx.export').replace("'deeplabv3_resnet50', num_classes=21", "'resnet18'")
    model = csg_seg.retrofit(torchvision.models.resnet18(), dict(ratio=4))
    exec(page, names := dict(csg_seg=csg_seg, torch=torch, model=model, image=torch.rand(2, 3, 64, 64)))
    assert sorted(path.name for path in tmp_path.iterdir()) == ['network.onnx', 'plain.pth', 'small.safetensors']
    plain = torchvision.models.resnet18()
    plain.load_state_dict(torch.load('plain.pth', weights_only=True))
    assert torch.allclose(plain.eval()(names['image']), names['network'](names['image']), atol=1e-4)


def test_plain_training_resumes_as_the_page_does(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = dict(csg_seg=csg_seg, torch=torch, build=torchvision.models.resnet18, csg=dict(ratio=4), epoch=3)
    names['model'] = model = csg_seg.retrofit(torchvision.models.resnet18(), dict(ratio=4))
    names['optimizer'] = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    model(torch.rand(2, 3, 64, 64)).sum().backward()
    names['optimizer'].step()
    exec(example('plain_pytorch.md', "'last.pth')\n"), names)
    exec(example('plain_pytorch.md', "torch.load('last.pth'"), names)
    assert names['model'] is not model
    for name, each in model.state_dict().items():
        assert torch.equal(each, names['model'].state_dict()[name]), name
    assert names['optimizer'].param_groups[0]['lr'] == 0.01 and names['optimizer'].state


def test_a_part_is_saved_as_the_page_does(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = nn.ModuleDict({'backbone': torchvision.models.resnet18(), 'head': nn.Linear(1000, 2)})
    backbone = torchvision.models.resnet18()
    csg_seg.retrofit(model, dict(ratio=4))
    exec(example('plain_pytorch.md', "'encoder.pth'"), dict(csg_seg=csg_seg, torch=torch, model=model))
    backbone.load_state_dict(torch.load('encoder.pth', weights_only=True))
    images = torch.rand(2, 3, 64, 64)
    assert torch.allclose(backbone.eval()(images), model.backbone.eval()(images), atol=1e-4)


def test_the_arrays_of_cifar10_are_made_as_the_page_does(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'data').mkdir()
    data = SimpleNamespace(data=np.zeros((6000, 32, 32, 3), np.uint8), targets=[1] * 6000)
    monkeypatch.setattr(torchvision.datasets, 'CIFAR10', lambda root, train, download: data)
    exec(example('classification.md', 'download=True'), {})
    arrays = np.load('data/cifar10-subset.npz')
    assert arrays['x_train'].shape == (5000, 32, 32, 3) and arrays['y_test'].shape == (5000,)
