"""The command csg-seg, and what it finds wrong with an installation."""

import json
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version

import pytest
import torch
from conftest import ROOT

import csg_seg
from csg_seg.cli import doctor
from csg_seg.cli.failures import EXTRAS, one_line_errors
from csg_seg.cli.main import TOOLS, tools


def csg_seg_command(*args):
    return subprocess.run([sys.executable, '-m', 'csg_seg', *args], cwd=ROOT, capture_output=True, text=True)


def examined(monkeypatch, installed):
    """Examine an installation that has other distributions than this one."""

    def other(name):
        found = installed[name] if name in installed else version(name)
        if found is None:
            raise PackageNotFoundError(name)
        return found

    monkeypatch.setattr(doctor, 'version', other)
    return {each.name: each for each in doctor.examine()}


def test_this_installation_is_sound_and_its_versions_are_named():
    found = {each.name: each for each in doctor.examine()}
    assert not [each for each in found.values() if each.remedy]
    assert found['csg_seg'].state == csg_seg.__version__ and found['torch'].state == torch.__version__
    assert version('onedl-mmcv') in found['mmcv'].state and 'onedl-mmcv' in found['mmcv'].state


@pytest.mark.parametrize(
    ('installed', 'name', 'says'),
    [
        ({'mmcv': '2.1.0'}, 'mmcv', 'overwrite each other'),
        ({'mmcv': '2.1.0', 'onedl-mmcv': None}, 'mm packages', 'take all from one line'),
        ({'onedl-mmsegmentation': None}, 'mmseg', "pip install '.[mm]'"),
        ({'safetensors': None}, 'safetensors', 'pip install safetensors'),
    ],
)
def test_what_does_not_go_together_is_named_with_a_remedy(installed, name, says, monkeypatch):
    assert says in examined(monkeypatch, installed)[name].remedy


def test_setup_and_readme_name_the_versions_that_doctor_checks():
    (oldest, newest), (torch_oldest, torch_newest) = doctor.PYTHON, doctor.TORCH
    setup, readme = (ROOT / 'setup.py').read_text(), (ROOT / 'README.md').read_text()
    assert f"python_requires='>={numbers(oldest)},<{numbers((newest[0], newest[1] + 1))}'" in setup
    assert f"'torch>={numbers(torch_oldest)}'" in setup
    assert f'Python {numbers(oldest)} to {numbers(newest)}' in readme
    assert f'torch {numbers(torch_oldest)} to {numbers(torch_newest)}' in readme


def numbers(version):
    return '.'.join(map(str, version))


@pytest.mark.parametrize(
    ('found', 'state', 'remedy'),
    [
        ('2.5.1+cpu', '2.5.1+cpu', 'use torch 2.6 to 2.15'),
        ('2.6.0', '2.6.0', ''),
        ('2.15.0+cu132', '2.15.0+cu132', ''),
        ('2.16.0a0', '2.16.0a0; newer than the tested 2.6 to 2.15', ''),
    ],
)
def test_an_old_torch_is_a_mistake_and_one_newer_than_tested_is_named(found, state, remedy, monkeypatch):
    monkeypatch.setattr(doctor, 'TORCH', ((2, 6), (2, 15)))
    monkeypatch.setattr(torch, '__version__', found)
    finding = examined(monkeypatch, {})['torch']
    assert (finding.state, finding.remedy) == (state, remedy)


@pytest.mark.parametrize('name', [name for name, _, _ in doctor.OPTIONAL])
def test_a_missing_optional_package_is_no_mistake_and_says_what_it_is_for(monkeypatch, name):
    found = examined(monkeypatch, {name: None})[name]
    assert 'optional, for ' in found.state and 'pip install' in found.state and not found.remedy


def test_a_missing_package_is_one_line_that_names_the_extra():
    for name, extra in EXTRAS.items():
        with pytest.raises(SystemExit) as end, one_line_errors():
            raise ModuleNotFoundError(name=f'{name}.inner')
        assert end.value.code.startswith(f'error: {name}.inner is not installed')
        assert f"pip install '.[{extra}]'" in end.value.code
    with pytest.raises(ModuleNotFoundError), one_line_errors():
        raise ModuleNotFoundError(name='unknown')


def test_a_package_that_does_not_import_is_named_with_the_reason(monkeypatch):
    def broken(name):
        if name == 'mmseg':
            raise AssertionError('MMCV==9 is used but incompatible')

    monkeypatch.setattr(doctor, 'import_module', broken)
    found = [each for each in doctor.examine() if each.name == 'mmseg']
    assert found[-1].state == 'does not import (AssertionError: MMCV==9 is used but incompatible)'
    assert 'onedl-mmsegmentation' in found[-1].remedy


def test_the_command_prints_json_and_lists_every_tool():
    done = csg_seg_command('doctor', '--json')
    assert done.returncode == 0
    assert {'name': 'csg_seg', 'state': csg_seg.__version__, 'remedy': ''} in json.loads(done.stdout)
    listed = csg_seg_command().stdout
    files = sorted(path.relative_to(ROOT / 'tools') for path in ROOT.glob('tools/**/*.py'))
    assert files and files == sorted(path.relative_to(TOOLS) for path in tools().values())
    assert all(f'  {name} ' in listed for name in (*tools(), 'doctor'))


@pytest.mark.parametrize(
    ('args', 'says'),
    [
        (['tran'], 'no command tran; did you mean train?'),
        (['x'], 'no command x; csg-seg --help lists them'),
        (['doctor', '-x'], 'does not know -x'),
    ],
)
def test_mistakes_are_one_line(args, says):
    done = csg_seg_command(*args)
    assert done.returncode == 1 and says in done.stderr.strip().splitlines()[-1]


def test_a_tool_runs_as_a_subcommand():
    config = 'configs/demo/deeplabv3_r18-d8-w32_drawn-voc-64x64.py'
    by_command = csg_seg_command('report', config, '--json')
    by_file = subprocess.run(
        [sys.executable, 'tools/report.py', config, '--json'], cwd=ROOT, capture_output=True, text=True
    )
    assert by_command.returncode == 0 and json.loads(by_command.stdout) == json.loads(by_file.stdout)
