"""What importing csg_seg.mm registers, and configs written before it existed."""

import json
import subprocess
import sys

import pytest
from conftest import ROOT, run_tool
from mmengine.config import Config

# The names that configs may use, by mmengine's registry.
REGISTERED = {
    'MODELS': ['CSGModel', 'TaughtModel', 'DeepLabV3PlusHead']
    + ['CIFARResNet', 'CIFARMobileNetV2', 'CIFARDenseNet', 'CIFARShuffleNetV2'],
    'HOOKS': ['CSGHook', 'ChannelsLastHook', 'CompactCheckpointHook', 'ExactResumeHook'],
    'DATASETS': ['mmseg.CamVidDataset', 'mmseg.KvasirDataset', 'mmseg.COCOVOCDataset']
    + ['NPZDataset', 'TarDataset', 'ImageFolderDataset'],
    'METRICS': ['PerClassAccuracy'],
}
DENSE = ROOT / 'configs' / 'cifar10' / 'resnet20_b64-20e_cifar10-npz.py'


def run_python(script: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, '-c', script], cwd=ROOT, capture_output=True, text=True, check=True)


def test_importing_mm_registers_every_name_and_prints_nothing():
    script = f"""
import csg_seg.mm, sys
from mmengine import registry
for root, names in {REGISTERED}.items():
    for name in names:
        found = getattr(registry, root).get(name)
        print(found and found.__name__, file=sys.stderr)
"""
    done = run_python(script)
    names = [name.rpartition('.')[2] for names in REGISTERED.values() for name in names]
    assert done.stderr.splitlines()[-len(names) :] == names
    assert done.stdout == ''


def test_mmpretrain_registers_its_networks_beside_transformers_5(tmp_path, monkeypatch):
    # mmpretrain asks for the version; transformers 5 lacks names that its multimodal networks import.
    (tmp_path / 'transformers').mkdir()
    (tmp_path / 'transformers' / '__init__.py').touch()
    (tmp_path / 'transformers-5.0.0.dist-info').mkdir()
    (tmp_path / 'transformers-5.0.0.dist-info' / 'METADATA').write_text(
        'Metadata-Version: 2.1\nName: transformers\nVersion: 5.0.0\n'
    )
    monkeypatch.setenv('PYTHONPATH', str(tmp_path))
    script = "import csg_seg.mm; from mmengine.registry import MODELS; print(MODELS.get('CIFARResNet'))"
    done = run_python(script)
    assert 'CIFARResNet' in done.stdout and 'cannot be imported' not in done.stderr


@pytest.fixture
def old_config(tmp_path):
    """A config of version 0.2, which imports csg_seg; no base of it imports csg_seg.mm."""
    cfg = Config.fromfile(DENSE).to_dict()
    cfg['model'].update(type='CSGModel', base_type='ImageClassifier', csg=dict(slice_shape=(12, 12, 3, 3), code_dim=72))
    cfg['custom_imports'] = dict(imports=['csg_seg'])
    Config(cfg).dump(tmp_path / 'old.py')
    assert 'csg_seg.mm' not in (tmp_path / 'old.py').read_text()
    return tmp_path / 'old.py'


@pytest.mark.parametrize('imports', ['import mmengine', 'import csg_seg, mmengine'])
def test_plain_mmengine_builds_a_config_of_version_0_2(old_config, imports):
    script = f"""
{imports}
cfg = mmengine.Config.fromfile({str(old_config)!r})
mmengine.registry.init_default_scope(cfg.default_scope)
model = mmengine.registry.MODELS.build(cfg.model)
print(sum(each.numel() for each in model.parameters()))
"""
    assert run_python(script).stdout.splitlines()[-1] == '115426'


@pytest.mark.parametrize('first', ['csg_seg', 'mmengine'])
def test_parts_that_cannot_be_imported_are_warned_about(first):
    second = 'csg_seg' if first == 'mmengine' else 'mmengine'
    script = f"""
import warnings, {first}, sys
sys.modules['csg_seg.mm'] = None
with warnings.catch_warnings(record=True) as told:
    warnings.simplefilter('always')
    import {second}
print([str(each.message) for each in told if 'csg_seg.mm' in str(each.message)])
"""
    assert 'csg_seg.mm cannot be imported' in run_python(script).stdout


def test_the_tools_read_a_config_of_version_0_2(old_config):
    assert json.loads(run_tool('report.py', old_config, '--json').stdout)['stored_params'] == 115_426


@pytest.mark.parametrize('package', ['mmcv', 'mmseg', 'mmpretrain'])
def test_packages_around_mmengine_may_be_imported_after_csg_seg(package):
    script = f"""
import csg_seg, {package}
from mmengine.registry import MODELS
print('CSGModel' in MODELS.module_dict)
"""
    done = run_python(script)
    assert done.stdout.splitlines()[-1] == 'True'
    assert 'cannot be imported' not in done.stderr
