"""The wheel: it includes configs and tools, needs little, and works in an empty folder."""

import os
import re
import subprocess
import sys
import sysconfig
import venv
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
import yaml
from conftest import ROOT, SMALL_MODEL, cfg_options
from mmengine.config import Config
from packaging.requirements import Requirement

import csg_seg
from csg_seg.cli.failures import EXTRAS
from csg_seg.errors import CSGError
from csg_seg.running.configs import read_config

PIP = [sys.executable, '-m', 'pip', '-q', '--disable-pip-version-check']
INDEX = yaml.safe_load((ROOT / 'model-index.yml').read_text())['Import']


@pytest.mark.parametrize('metafile', INDEX)
def test_a_metafile_lists_the_csg_configs_beside_it(metafile):
    path = ROOT / metafile
    listed = yaml.safe_load(path.read_text())
    wanted = {config.stem for config in path.parent.glob('*.py') if 'csg-' in config.name}
    assert wanted and {model['Name'] for model in listed['Models']} == wanted
    for model in listed['Models']:
        assert (ROOT / model['Config']).stem == model['Name']
        assert model['In Collection'] == listed['Collections'][0]['Name']


def test_every_folder_of_configs_has_a_metafile():
    folders = {path.parent.name for path in ROOT.glob('configs/*/*.py')}
    assert folders == {Path(metafile).parent.name for metafile in INDEX}


def test_a_base_of_the_package_is_that_file(tmp_path):
    name = 'deeplabv3/csg-s16-d128_deeplabv3_r50-d8_4xb4-20k_voc12-512x512.py'
    (tmp_path / 'mine.py').write_text(f"_base_ = 'csg_seg::{name}'\nmodel = dict(csg=dict(code_dim=64))\n")
    mine, theirs = read_config(str(tmp_path / 'mine.py')), Config.fromfile(ROOT / 'configs' / name)
    theirs.model.csg.code_dim = 64
    assert mine.to_dict() == theirs.to_dict()
    (tmp_path / 'mine.py').write_text("_base_ = 'csg_seg::deeplabv3/none.py'\n")
    with pytest.raises((CSGError, FileNotFoundError), match='one of its bases is missing'):
        read_config(str(tmp_path / 'mine.py'))


def run(*command, **options):
    done = subprocess.run([*map(str, command)], text=True, capture_output=True, **options)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


@pytest.fixture(scope='module')
def wheel(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp('wheel')
    run(*PIP, 'wheel', '--no-deps', '--no-build-isolation', '-w', folder, ROOT)
    (path,) = folder.glob('*.whl')
    return path


@pytest.fixture(scope='module')
def installed(wheel, tmp_path_factory) -> tuple[Path, Path]:
    """The Python of an environment that has the wheel and nothing else, and its folder of packages."""
    folder = tmp_path_factory.mktemp('env')
    venv.create(folder)
    python = folder / 'bin' / 'python'
    # A checkout on PYTHONPATH would count as installed.
    environment = {key: value for key, value in os.environ.items() if key != 'PYTHONPATH'}
    run(*PIP, '--python', python, 'install', '--no-deps', wheel, env=environment)
    return python, next(folder.glob('lib/python*')) / 'site-packages'


def requirements(names) -> set[str]:
    """Return the distributions that some distributions need, themselves included."""
    found, waiting = set(), set(names)
    while waiting:
        name = waiting.pop()
        found.add(name)
        for each in map(Requirement, metadata.requires(name) or []):
            if each.marker is None or each.marker.evaluate({'extra': ''}):
                waiting |= {each.name} - found
    return found


@pytest.fixture
def light_libraries(installed, tmp_path) -> Path:
    """A folder with links to the packages that the core requires, and those that they require."""
    here, folder = Path(sysconfig.get_path('purelib')), tmp_path / 'libraries'
    folder.mkdir()
    _, site = installed
    (wheel,) = metadata.distributions(name='csg_seg', path=[str(site)])
    required = [Requirement(each) for each in wheel.requires or []]
    for name in requirements(each.name for each in required if each.marker is None):
        for entry in {file.parts[0] for file in metadata.files(name)} - {'..', '__pycache__'}:
            link = folder / entry
            if not link.exists():
                link.symlink_to(here / entry)
    return folder


CORE = """
import importlib.util, sys
import torch
from torch import nn
import csg_seg

for name in sys.argv[1:]:
    assert importlib.util.find_spec(name) is None, name

class Net(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Conv2d(3, 31, 3), nn.ReLU(), nn.Conv2d(31, 17, 3))

model = csg_seg.retrofit(Net(), dict(slice_shape=(12, 20, 3, 3), code_dim=1))
x = torch.randn(1, 3, 9, 9)
out = model(x)
csg_seg.save_compact(model, 'model.safetensors')
loaded = csg_seg.load_compact('model.safetensors', Net())
assert torch.equal(loaded(x), out)
print(csg_seg.__file__)
"""


def test_the_wheel_without_extras_retrofits_saves_and_loads(installed, light_libraries, tmp_path):
    python, site = installed
    environment = {**os.environ, 'PYTHONPATH': str(light_libraries)}
    where = run(python, '-c', CORE, *EXTRAS, 'timm', cwd=tmp_path, env=environment)
    assert Path(where.strip()).is_relative_to(site)


def test_import_loads_no_other_package():
    script = """
import sys
import numpy, safetensors.torch, torch
before = set(sys.modules)
import csg_seg
print(*sorted(set(sys.modules) - before))
"""
    loaded = run(sys.executable, '-c', script, cwd=ROOT).split()
    assert 'csg_seg.storage.compact' in loaded
    assert {name.split('.')[0] for name in loaded} - sys.stdlib_module_names <= {'csg_seg', 'torch'}
    # They take seconds to import, and a retrofit does not need them.
    assert not [name for name in loaded if name.startswith(('torch._dynamo', 'torch._inductor', 'csg_seg.mm'))]


def test_the_wheel_has_the_package_and_its_tools_only(wheel):
    with zipfile.ZipFile(wheel) as file:
        names = file.namelist()
    assert {name.split('/')[0] for name in names} == {'csg_seg', f'csg_seg-{csg_seg.__version__}.dist-info'}
    tools = {str(path.relative_to(ROOT)) for path in ROOT.glob('tools/**/*.py')}
    assert tools
    assert {name.removeprefix('csg_seg/.mim/') for name in names if '.mim/tools/' in name} >= tools
    for tool in tools:
        assert not re.search(r'^\s*(from|import) (experiments|tests)', (ROOT / tool).read_text(), re.MULTILINE), tool


def test_the_wheel_trains_from_an_empty_folder(installed, tmp_path, drawn):
    python, site = installed
    # The libraries of this environment, without this project: .pth files on PYTHONPATH are not read.
    environment = {**os.environ, 'PYTHONPATH': sysconfig.get_path('purelib')}
    (tmp_path / 'mine.py').write_text(
        "_base_ = 'csg_seg::deeplabv3/csg-s16-d128_deeplabv3_r18-d8_4xb4-20k_voc12-512x512.py'\n"
        'train_cfg = dict(max_iters=1, val_interval=1)\n'
    )
    small = SMALL_MODEL | {'train_dataloader.dataset.pipeline.3.crop_size': (64, 64)}
    small |= {f'{split}_dataloader.dataset.data_root': drawn for split in ('train', 'val', 'test')}
    small |= {f'{split}_dataloader.num_workers': 0 for split in ('train', 'val', 'test')}
    small |= {f'{split}_dataloader.persistent_workers': False for split in ('train', 'val', 'test')}
    train = [site / 'csg_seg' / '.mim' / 'tools' / 'train.py', 'mine.py', '--work-dir', 'work', *cfg_options(small)]
    run(python, *train, cwd=tmp_path, env=environment)
    assert (tmp_path / 'work' / 'iter_1.safetensors').exists()
    where = run(python, '-c', 'import csg_seg; print(csg_seg.__file__)', cwd=tmp_path, env=environment)
    assert Path(where.strip()).is_relative_to(site)
