"""The wheel is enough: configs and tools come with it, and train from an empty folder."""

import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest
import yaml
from conftest import ROOT, SMALL_MODEL, cfg_options
from mmengine.config import Config

from csg_seg.errors import CSGError
from csg_seg.mm.running.configs import read_config

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


def test_the_wheel_trains_from_an_empty_folder(tmp_path, drawn):
    def run(*command, **options):
        done = subprocess.run([*map(str, command)], text=True, capture_output=True, **options)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
        return done.stdout

    pip = [sys.executable, '-m', 'pip', '-q', '--disable-pip-version-check']
    run(*pip, 'wheel', '--no-deps', '--no-build-isolation', '-w', tmp_path, ROOT)
    venv.create(tmp_path / 'env')
    python = tmp_path / 'env' / 'bin' / 'python'
    (wheel,) = tmp_path.glob('*.whl')
    run(*pip, '--python', python, 'install', '--no-deps', wheel)
    # The libraries are those of this environment; a line of theirs that imports is not run, so this project is not.
    site = next((tmp_path / 'env' / 'lib').glob('python*')) / 'site-packages'
    (site / 'libraries.pth').write_text(sysconfig.get_path('purelib') + '\n')
    folder = tmp_path / 'empty'
    folder.mkdir()
    (folder / 'mine.py').write_text(
        "_base_ = 'csg_seg::deeplabv3/csg-s16-d128_deeplabv3_r18-d8_4xb4-20k_voc12-512x512.py'\n"
        'train_cfg = dict(max_iters=1, val_interval=1)\n'
    )
    small = SMALL_MODEL | {'train_dataloader.dataset.pipeline.3.crop_size': (64, 64)}
    small |= {f'{split}_dataloader.dataset.data_root': drawn for split in ('train', 'val', 'test')}
    small |= {f'{split}_dataloader.num_workers': 0 for split in ('train', 'val', 'test')}
    small |= {f'{split}_dataloader.persistent_workers': False for split in ('train', 'val', 'test')}
    tools = site / 'csg_seg' / '.mim' / 'tools'
    run(python, tools / 'train.py', 'mine.py', '--work-dir', 'work', *cfg_options(small), cwd=folder)
    assert (folder / 'work' / 'iter_1.safetensors').exists()
    where = run(python, '-c', 'import csg_seg; print(csg_seg.__file__)', cwd=folder).splitlines()[-1]
    assert Path(where).is_relative_to(site)
