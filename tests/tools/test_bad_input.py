"""A user's mistakes at the command line: one line, a non-zero exit status, nothing half-written."""

import json
import runpy
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, SMALL_MODEL, cfg_options, run_tool
from mmengine.config import Config
from mmengine.runner.checkpoint import CheckpointLoader

from csg_seg import CSGError, materialise, save_compact
from csg_seg.cli.failures import one_line_errors
from csg_seg.mm.model import build_model
from csg_seg.running.configs import read_config
from csg_seg.running.preflight import check_backbone

CONFIGS = ROOT / 'configs' / 'deeplabv3'
DENSE = CONFIGS / 'deeplabv3_r18-d8_4xb4-20k_voc12-512x512.py'
CSG = DENSE.with_name(f'csg-s16-d128_{DENSE.name}')


@pytest.fixture
def refused(refused, tmp_path):
    """As in conftest, with a work folder; check that nothing is half-written."""

    def call(tool, *args) -> str:
        work_dir = ['--work-dir', tmp_path / 'work'] if tool in ('train.py', 'test.py') else []
        message = refused(tool, *args, *work_dir)
        if tool == 'train.py' and 'load_from' not in str(args):
            assert not (tmp_path / 'work').exists()
        assert not list(tmp_path.rglob('*.partial'))
        return message

    return call


@pytest.fixture(scope='module')
def files(tmp_path_factory):
    """Checkpoints of the small network: CSG, dense, compact; and damaged copies."""
    folder = tmp_path_factory.mktemp('files')
    cfg = Config.fromfile(CSG)
    cfg.merge_from_dict(SMALL_MODEL)
    model = build_model(cfg)
    torch.save({'meta': {}, 'state_dict': model.state_dict()}, folder / 'csg.pt')
    own = {'model': model.state_dict(), 'ema': model.state_dict(), 'optimizer': {'param_groups': []}, 'epoch': 1}
    torch.save(own, folder / 'own.pth')
    save_compact(model, folder / 'compact.safetensors')
    torch.save({'meta': {}, 'state_dict': materialise(model).state_dict()}, folder / 'dense.pt')
    whole = (folder / 'compact.safetensors').read_bytes()
    (folder / 'truncated.safetensors').write_bytes(whole[:-100])
    (folder / 'corrupted.safetensors').write_bytes(whole[:-100] + bytes(100))
    (folder / 'truncated.pt').write_bytes((folder / 'csg.pt').read_bytes()[:-100])
    return folder


def small(drawn, **more) -> list[str]:
    roots = {f'{split}_dataloader.dataset.data_root': drawn for split in ('train', 'val', 'test')}
    return cfg_options({**SMALL_MODEL, **roots, **more})


@pytest.mark.parametrize(
    ('options', 'says'),
    [
        ({'model.csg.code_dims': 64}, ["unknown key 'code_dims'", "did you mean 'code_dim'"]),
        ({'model.csg.include': "['backbon']"}, ["'backbon' names no conv", 'the nearest are backbone']),
        ({'model.csg.slice_shape': '(16,16,5,5)'}, ['fits 5x5 kernels', '1x1, 3x3', 'change the last numbers']),
        ({'model.csg.slice_shape': '(16,16,3)'}, ['fits 3 kernels', '1x1, 3x3', 'change the last numbers']),
        ({'model.csg.slice_shape': '(16,16)'}, ['four positive integers', '(16, 16)']),
        ({'model.csg.code_dim': 0}, ['code_dim must be an integer of at least 1']),
        ({'model.csg.exclude': "['*']"}, ['csg[0] takes no layer', 'all stay dense (excluded)']),
        ({'model.base_type': None}, ['base_type={{_base_.model.type}}']),
        ({'model.keep_weight': False}, ["EncoderDecoder does not take 'keep_weight'", 'correct the key']),
        ({'model.base_type': 'ResNetV1c'}, ["ResNet does not take 'data_preprocessor'", 'correct the key']),
    ],
)
def test_wrong_settings(refused, drawn, options, says):
    for tool in ('train.py', 'report.py'):
        message = refused(tool, CSG, *small(drawn, **options))
        assert all(part in message for part in says), message


def test_scores_that_do_not_exist(refused, drawn, files):
    says = "_evaluator: iou_metrics has 'mIuO'; there are mIoU, mDice, mFscore"
    assert says in refused('train.py', CSG, *small(drawn, **{'val_evaluator.iou_metrics': 'mIuO'}))
    message = refused('train.py', CSG, *small(drawn, **{'default_hooks.checkpoint.save_best': 'mIuO'}))
    assert "save_best: there is no score 'mIuO'; the nearest are mIoU" in message
    message = refused(
        'compact.py', CSG, files / 'csg.pt', '--out', files / 'x.safetensors', '--test', 'x', *small(drawn)
    )
    assert "--test x: there is no score 'x'" in message


def test_lines_in_the_wrong_place(refused, drawn, tmp_path):
    config = tmp_path / 'mine.py'
    base = f"_base_ = {str(DENSE)!r}\ncustom_imports = dict(imports=['csg_seg.mm'])\n"
    csg = "type='CSGModel', base_type={{_base_.model.type}}, csg=dict(ratio=4)"
    cases = {
        f'{base}csg = dict(ratio=4)\n': 'csg is a key of the config; put it into model',
        f'{base}model = dict(backbone=dict({csg.replace("model.type", "model.backbone.type")}))\n': (
            "model.backbone is a CSGModel, and only the model as a whole can be one; .* include=['backbone']"
        ),
        f'model = dict({csg})\n': "no base config has 'model', which it takes from '_base_'; name one",
        f'{base}test_cfg = dict(type=dict(a=1))\n': 'type is a dict in the child config .* `_delete_=True` to ignore',
    }
    for text, says in cases.items():
        config.write_text(text)
        for tool in ('train.py', 'report.py'):
            options = small(drawn) if text.startswith(base) else []
            assert all(part in refused(tool, config, *options) for part in says.split(' .* '))
    config.write_text(f'{base}model = dict({csg})\nmodel = dict(pretrained=None)\n')
    assert 'a later model = ... replaces the CSGModel' in refused('train.py', config, *small(drawn))
    config.write_text(f'{base}# model = dict({csg})\n')
    assert read_config(config).model.type == 'EncoderDecoder'


@pytest.mark.parametrize('name', ['dense.pt', 'csg.pt'])
def test_a_backbone_that_starts_from_a_whole_network(name, refused, drawn, files):
    message = refused('train.py', CSG, *small(drawn, **{'model.pretrained': files / name}))
    assert f'{name}: no name is one of the backbone' in message and "prefix='backbone.'" in message
    start = {'model.pretrained': None, 'model.backbone.init_cfg.type': 'Pretrained'}
    start |= {'model.backbone.init_cfg.checkpoint': files / 'dense.pt', 'model.backbone.init_cfg.prefix': 'backbone.'}
    cfg = read_config(CSG, {**SMALL_MODEL, **{key: each and str(each) for key, each in start.items()}})
    check_backbone(cfg, build_model(cfg))


def test_weights_that_cannot_be_downloaded():
    with pytest.raises(SystemExit, match='cannot download the weights .* model.pretrained=None'), one_line_errors():
        CheckpointLoader.load_checkpoint('http://127.0.0.1:9/none.pth')


def test_csg_in_the_hook_and_in_the_model(refused, drawn):
    message = refused('train.py', CSG, *small(drawn, **{'default_hooks.csg.csg.ratio': 8}))
    assert "CSGHook has csg={'ratio': 8}, and the model is a CSGModel of csg=" in message and 'drop one' in message


@pytest.mark.parametrize('name', ['csg.pt', 'compact.safetensors', 'own.pth'])
def test_report_prints_the_csg_of_a_checkpoint(name, files):
    state_dict = torch.load(files / 'csg.pt', weights_only=True)['state_dict']
    csg = json.loads(run_tool('report.py', files / name, '--json').stdout)['csg']
    cfg = read_config(CSG, {**SMALL_MODEL, 'model.csg': csg})
    build_model(cfg).load_state_dict(state_dict)


def test_report_of_a_dense_checkpoint(refused, files):
    assert 'not a checkpoint of a CSG network' in refused('report.py', files / 'dense.pt')


def test_options_for_keys_that_no_run_reads():
    with pytest.raises(CSGError, match="option modle.csg: the config has no 'modle'; did you mean 'model'?"):
        read_config(CSG, {'modle.csg': {}})
    added = {'tta_pipeline': [], 'randomness.seed': 1, 'resume': True, 'crop': 3}
    assert read_config(DENSE, added).crop == 3


def test_second_dict_takes_nothing(refused, drawn, tmp_path):
    config = tmp_path / 'two.py'
    dicts = [dict(slice_shape=(16, 16, 3, 3), code_dim=128), dict(slice_shape=(8, 8, 3, 3), code_dim=32)]
    config.write_text(f'_base_ = {str(CSG)!r}\nmodel = dict(csg={dicts!r})\n')
    message = refused('train.py', config, *small(drawn))
    assert 'csg[1] takes no layer: earlier dicts took' in message and 'drop this dict' in message


@pytest.mark.parametrize(
    ('name', 'options', 'says'),
    [
        ('dense.pt', {}, ['a dense checkpoint', 'use it with the dense config']),
        ('csg.pt', {'model.csg.code_dim': 64}, ['made with code_dim=128', 'has code_dim=64']),
        (
            'csg.pt',
            {'model.csg.slice_shape': '(12,12,3,3)'},
            ['slice_shape=[16, 16, 3, 3]', 'has slice_shape=[12, 12, 3, 3]'],
        ),
        ('compact.safetensors', {'model.csg.code_dim': 64}, ['made with code_dim=128']),
        ('truncated.safetensors', {}, ['truncated.safetensors', 'damaged', 'copy it again']),
        ('corrupted.safetensors', {}, ['corrupted.safetensors', 'checksum', 'copy it again']),
        ('truncated.pt', {}, ['truncated.pt', 'damaged', 'copy it again']),
        ('absent.pt', {}, ['absent.pt', 'no such file']),
    ],
)
def test_wrong_checkpoint(refused, drawn, files, tmp_path, name, options, says):
    out = tmp_path / 'plain.pt'
    # To test a dense checkpoint is to test its fit.
    test = [] if name == 'dense.pt' else [('test.py', CSG, files / name, *small(drawn, **options))]
    commands = [
        *test,
        ('materialise.py', CSG, files / name, '--out', out, *cfg_options({**SMALL_MODEL, **options})),
        ('report.py', CSG, '--checkpoint', files / name, *cfg_options({**SMALL_MODEL, **options})),
    ]
    for tool, *args in commands:
        message = refused(tool, *args)
        assert all(part in message for part in says), f'{tool}: {message}'
    assert not out.exists()


class Malice:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), 'w')


def test_a_checkpoint_is_not_unpickled(refused, drawn, tmp_path):
    path, harm = tmp_path / 'malice.pt', tmp_path / 'harm'
    torch.save({'meta': {}, 'state_dict': {}, 'more': Malice(harm)}, path)
    commands = [
        ('test.py', CSG, path, *small(drawn)),
        ('train.py', CSG, *small(drawn, load_from=path)),
        ('materialise.py', CSG, path, '--out', tmp_path / 'plain.pt', *cfg_options(SMALL_MODEL)),
        ('report.py', CSG, '--checkpoint', path, *cfg_options(SMALL_MODEL)),
        ('model_converters/released2csg.py', path, '--out', tmp_path / 'released.pth'),
    ]
    for tool, *args in commands:
        assert 'not unpickled' in refused(tool, *args), tool
        assert not harm.exists(), tool


@pytest.mark.parametrize('name', ['csg.pt', 'compact.safetensors'])
def test_generated_checkpoint_for_a_dense_config(refused, drawn, files, name):
    message = refused('test.py', DENSE, files / name, *small(drawn))
    assert 'a CSG checkpoint' in message and 'materialise' in message


def test_a_dense_network_has_no_codes_to_export(refused, files, drawn, tmp_path):
    image = next(drawn.rglob('*.jpg'))
    out = ('--images', image, '--out', tmp_path / 'x.onnx', '--generated')
    message = refused('export_onnx.py', DENSE, files / 'dense.pt', *out, *cfg_options(SMALL_MODEL))
    assert '--generated: this network is dense' in message and not list(tmp_path.iterdir())


def test_materialise_writes_no_other_kind_of_file_and_needs_a_csg_config(refused, files, tmp_path):
    message = refused('materialise.py', CSG, files / 'csg.pt', '--out', tmp_path / 'plain.safetensors')
    assert 'must end in .pth' in message
    message = refused('materialise.py', DENSE, files / 'dense.pt', '--out', tmp_path / 'plain.pth')
    assert 'a dense config; give the CSG config' in message


@pytest.mark.parametrize(
    ('option', 'says'),
    [
        ('model.csg.code_dim', "'model.csg.code_dim' is not key=value"),
        ('=4', "'=4' is not key=value"),
        ('model.csg=dict(ratio=4, include=[backbone])', 'holds a dict; give its keys one by one'),
        ('custom_hooks=[dict(type=EMAHook)]', 'holds a dict; give its keys one by one'),
        ("model.csg={'ratio': 4}", 'holds a dict; give its keys one by one'),
        ('model.csg.include=[backbone,', 'has brackets that do not match'),
    ],
)
def test_an_option_that_cannot_be_read_is_named(option, says, monkeypatch, capsys):
    monkeypatch.setattr(sys, 'argv', ['report.py', str(CSG), '--cfg-options', option])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(ROOT / 'tools' / 'report.py'), run_name='__main__')
    assert end.value.code == 2
    message = capsys.readouterr().err
    assert '--cfg-options: ' in message and says in message


def test_materialise_does_not_overwrite_unasked(drawn, files, tmp_path):
    out = tmp_path / 'plain.pt'
    out.write_text('mine')
    arguments = [CSG, files / 'csg.pt', '--out', out, *cfg_options(SMALL_MODEL)]
    done = run_tool('materialise.py', *arguments, check=False)
    assert done.returncode == 1 and 'give --overwrite' in done.stderr and out.read_text() == 'mine'
    done = run_tool('materialise.py', *arguments, '--overwrite', '--json')
    assert json.loads(done.stdout)['bytes'] == out.stat().st_size


def test_missing_data(refused, tmp_path):
    message = refused('train.py', CSG, *small(tmp_path / 'nowhere'))
    assert 'nowhere does not exist' in message and 'see docs/data.md' in message


@pytest.mark.parametrize(
    ('lose', 'says'),
    [
        ('ImageSets/Segmentation/train.txt', 'train.txt does not exist'),
        ('JPEGImages', 'JPEGImages does not exist'),
        ('SegmentationClass/train_00003.png', '1 of 32 files are missing'),
    ],
)
def test_half_prepared_data(refused, drawn, tmp_path, lose, says):
    half = shutil.copytree(drawn, tmp_path / 'half')
    lost = half / lose
    shutil.rmtree(lost) if lost.is_dir() else lost.unlink()
    message = refused('train.py', CSG, *small(half))
    assert says in message and 'docs/data.md' in message


def test_voc12aug_without_its_list(refused, drawn):
    config = CSG.with_name(CSG.name.replace('voc12', 'voc12aug'))
    roots = {f'train_dataloader.dataset.datasets.{position}.data_root': drawn for position in (0, 1)}
    message = refused('train.py', config, *cfg_options({**SMALL_MODEL, **roots}))
    assert 'does not exist' in message and 'SegmentationClassAug' in message


@pytest.mark.parametrize(
    ('setting', 'registry'),
    [("custom_hooks = [dict(type='NoSuch')]", 'hook'), ("model = dict(backbone=dict(type='NoSuch'))", 'model')],
)
def test_a_type_that_nothing_registers(drawn, tmp_path, setting, registry):
    (tmp_path / 'typo.py').write_text(f'_base_ = {str(DENSE)!r}\n{setting}\n')
    done = run_tool('train.py', tmp_path / 'typo.py', *small(drawn), '--work-dir', tmp_path / 'work', check=False)
    assert done.returncode == 1
    said = f'error: NoSuch is not in the mmseg::{registry} registry; correct the name, or import the module that'
    assert done.stderr.strip().splitlines()[-1].startswith(said)


def test_missing_config(refused):
    assert 'absent.py' in refused('train.py', CONFIGS / 'absent.py')
    assert 'README.md: not a config' in refused('report.py', ROOT / 'README.md')


def test_dense_config_does_not_start_from_codes(drawn, files, tmp_path, refused):
    message = refused('train.py', DENSE, *small(drawn, load_from=files / 'csg.pt'))
    assert 'the config is dense' in message


@pytest.mark.parametrize('tool', ['train.py', 'test.py'])
def test_weights_under_other_names_do_not_leave_a_network_random(refused, drawn, files, tmp_path, tool):
    state_dict = torch.load(files / 'dense.pt')['state_dict']
    torch.save({'model': {f'net.{name}': each for name, each in state_dict.items()}}, tmp_path / 'other.pth')
    given = [tmp_path / 'other.pth'] if tool == 'test.py' else []
    more = {} if given else {'load_from': tmp_path / 'other.pth'}
    message = refused(tool, DENSE, *given, *small(drawn, **more))
    assert 'is missing' in message and 'no name is the same' in message and 'rename_weights.py' in message


@pytest.mark.parametrize(('config', 'file'), [(DENSE, 'dense.pt'), (CSG, 'csg.pt'), (CSG, 'dense.pt')])
def test_a_test_needs_all_weights_in_their_shapes(refused, drawn, files, tmp_path, config, file):
    state_dict = torch.load(files / file)['state_dict']
    head = 'decode_head.conv_seg.weight'
    for change, says in (
        ({head: state_dict[head][:3]}, f'{head} is (3, 32, 1, 1) instead of (21, 32, 1, 1)'),
        ({head: None}, f'{head} is missing'),
    ):
        changed = {name: each for name, each in {**state_dict, **change}.items() if each is not None}
        torch.save({'state_dict': changed}, tmp_path / 'changed.pth')
        message = refused('test.py', config, tmp_path / 'changed.pth', *small(drawn))
        assert says in message and message.endswith('use a checkpoint of this config')


@pytest.mark.parametrize(('launcher', 'says'), [('slurm', 'SLURM_PROCID'), ('pytorch', 'RANK'), ('mpi', 'RANK')])
def test_launcher_without_its_environment(refused, drawn, launcher, says):
    message = refused('train.py', CSG, '--launcher', launcher, *small(drawn))
    assert says in message and 'is not set; start the run with' in message


class Hostile:
    def __reduce__(self):
        return getattr, ('', 'join')


@pytest.mark.parametrize(
    ('content', 'says'), [(None, 'copy it again'), ([1, 2], 'give a training checkpoint'), (Hostile(), 'not unpickled')]
)
def test_foreign_pickles_are_refused(refused, tmp_path, content, says):
    if content is None:
        (tmp_path / 'foreign.pt').write_text('a text')
    else:
        torch.save(content, tmp_path / 'foreign.pt')
    message = refused('report.py', CSG, '--checkpoint', tmp_path / 'foreign.pt')
    assert 'foreign.pt' in message and says in message


def test_mixed_precision_that_this_machine_cannot_compute(refused, drawn, files, tmp_path, monkeypatch):
    if torch.cuda.is_available():
        pytest.skip('there is a GPU')
    amp = {'optim_wrapper.type': 'AmpOptimWrapper'}
    half = small(drawn, **amp, **{'optim_wrapper.dtype': 'float16'})
    runs = ['--work-dir', tmp_path / 'runs']
    assert 'float16 needs a GPU; set optim_wrapper.dtype=bfloat16' in refused('train.py', CSG, *runs, *half)
    monkeypatch.setattr('csg_seg.mm.mixed_precision.has_bfloat16', lambda: False)
    commands = {
        'train.py': [CSG, *runs, *small(drawn, **amp)],
        'compare.py': [DENSE, CSG, *runs, *small(drawn, **amp)],
        'experiments.exchange': [DENSE, CSG, *small(drawn, **amp)],
        'test.py': [CSG, files / 'csg.pt', '--amp', *runs, *small(drawn)],
    }
    commands_with_option = {'train.py': [CSG, '--amp', *runs, *small(drawn)]}
    for tool, arguments in [*commands.items(), *commands_with_option.items()]:
        assert 'leave --amp out, or set optim_wrapper.type=OptimWrapper' in refused(tool, *arguments), tool
    assert not (tmp_path / 'runs').exists()


@pytest.mark.parametrize(
    ('options', 'says'),
    [
        ({'optim_wrapper.dtype': 'bfloat16'}, "unexpected keyword argument 'dtype'"),
        ({'optim_wrapper.optimizer.type': 'AdamX'}, '(optimizer AdamX)'),
        ({'optim_wrapper.optimizer.lr': -1}, 'Invalid learning rate: -1'),
        ({'optim_wrapper.optimizer.rate': 1}, "unexpected keyword argument 'rate'"),
    ],
)
def test_an_optimizer_that_cannot_be_built(refused, drawn, options, says):
    message = refused('train.py', CSG, *small(drawn, **options))
    assert 'optim_wrapper (' in message and says in message and message.endswith('; correct it in the config')


@pytest.mark.parametrize('tool', ['train.py', 'test.py', 'report.py', 'materialise.py', 'compare.py'])
def test_mm_packages_absent(tool):
    script = f"""
import importlib.util, runpy, sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split('.')[0] in ('mmcv', 'mmengine', 'mmseg', 'mmpretrain'):
            raise ModuleNotFoundError(f'No module named {{name!r}}', name=name)

sys.meta_path.insert(0, Absent())
find_spec = importlib.util.find_spec
importlib.util.find_spec = lambda name, *args: None if name.startswith('mm') else find_spec(name, *args)
sys.argv = ['tool', 'config.py']
runpy.run_path({str(ROOT / 'tools' / tool)!r}, run_name='__main__')
"""
    done = subprocess.run([sys.executable, '-c', script], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 1
    assert done.stderr.strip() == "error: mmengine is not installed; pip install '.[mm]' in csg_seg's folder brings it"


@pytest.mark.parametrize(
    ('options', 'says'),
    [
        (['--jobs', '0'], 'jobs start at 1'),
        (['--seeds', '-1'], 'seeds at 0'),
        (['--out', 'README.md'], 'README.md exists'),
    ],
)
def test_a_comparison_of_generators_that_cannot_be_run(refused, tmp_path, monkeypatch, options, says):
    monkeypatch.chdir(ROOT)
    assert says in refused('experiments.rivals', *options, '--work-dir', tmp_path / 'runs')
    assert not (tmp_path / 'runs').exists()


def test_a_work_dir_that_is_a_file(refused, drawn, files, tmp_path):
    (tmp_path / 'work').touch()
    assert 'is a file; give a folder' in refused('test.py', CSG, files / 'csg.pt', *small(drawn))
