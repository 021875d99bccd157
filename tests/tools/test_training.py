"""Training, resuming, testing and materialising by the tools, on real images."""

import json
import re
import signal
import subprocess
import sys
import time
from functools import cached_property, lru_cache
from pathlib import Path

import mmseg
import pytest
import torch
from conftest import ROOT, SMALL_MODEL, cfg_options, run_script, run_tool

MMSEG_TOOLS = Path(mmseg.__file__).parent / '.mim' / 'tools'
ITERS = 24


def loader_options(split, root, **more):
    loader = f'{split}_dataloader'
    return {f'{loader}.dataset.data_root': root, f'{loader}.num_workers': 1, **more}


def options(data: str, root: Path) -> dict:
    """Shrink a config of ``configs/deeplabv3`` to seconds; everything else stays as it is."""
    pipeline = 'dataloader.dataset.pipeline'
    small = {
        **SMALL_MODEL,
        'randomness.seed': 0,
        'train_cfg.max_iters': ITERS,
        'train_cfg.val_interval': ITERS // 3,
        'param_scheduler.0.end': ITERS,
        'default_hooks.checkpoint.interval': ITERS // 3,
        'default_hooks.logger.interval': 1,
        f'train_{pipeline}.3.crop_size': (64, 64),
    }
    for split in ('train', 'val', 'test'):
        small |= loader_options(split, root)
    if data != 'camvid':
        small[f'train_{pipeline}.2.scale'] = (256, 96)
        small |= {f'{split}_{pipeline}.1.scale': (256, 96) for split in ('val', 'test')}
    else:
        small[f'train_{pipeline}.2.scale'] = (128, 96)
        small |= {f'{split}_dataloader.dataset.indices': 12 for split in ('val', 'test')}
    return small


CONFIGS = {
    'drawn': 'deeplabv3_r18-d8_4xb4-20k_voc12-512x512.py',
    'voc12': 'deeplabv3_r18-d8_4xb4-20k_voc12-512x512.py',
    'camvid': 'deeplabv3_r18-d8_2xb4-20k_camvid-360x480.py',
}


class Run:
    """One data set's unbroken training, and how to repeat it."""

    def __init__(self, data: str, root: Path, folder: Path):
        name = CONFIGS[data]
        self.folder = folder
        self.dense = ROOT / 'configs' / 'deeplabv3' / name
        self.config = self.dense.with_name(f'csg-s16-d128_{name}')
        self.options = cfg_options(options(data, root))
        self.work_dir = folder / 'unbroken'
        run_tool('train.py', self.config, '--work-dir', self.work_dir, *self.options)

    @property
    def checkpoint(self) -> Path:
        return self.work_dir / f'iter_{ITERS}.pth'

    @cached_property
    def score(self) -> float:
        """mIoU of the last checkpoint, in percent, by our tool."""
        return self.test(self.checkpoint)

    def test(self, checkpoint: Path) -> float:
        return miou(
            run_tool('test.py', self.config, checkpoint, '--work-dir', self.folder / 'test', *self.options).stdout
        )


@pytest.fixture(scope='module')
def trained(request, drawn, tmp_path_factory):
    """Train on a data set the first time it is asked for: real images, or drawn ones where there are none."""

    def train(data: str) -> Run:
        if data == 'drawn':
            root = drawn
        else:
            part = {'voc12': 'VOCdevkit/VOC2012', 'camvid': 'camvid'}[data]
            root = request.getfixturevalue('real_data') / part
        return Run(data, root, tmp_path_factory.mktemp(data))

    return lru_cache(train)


def data_sets(config) -> list[str]:
    return ['voc12', 'camvid'] if config.getoption('--data-root') else ['drawn', 'voc12', 'camvid']


def pytest_generate_tests(metafunc):
    if 'run' in metafunc.fixturenames:
        # Two data sets go the same ways; of the second, the check of every commit is that it learns.
        long = [] if metafunc.function is test_loss_falls else [pytest.mark.full]
        each = [pytest.param(name, marks=long if name == 'camvid' else []) for name in data_sets(metafunc.config)]
        metafunc.parametrize('run', each, indirect=True)


@pytest.fixture
def run(request, trained) -> Run:
    return trained(request.param)


def weights(path: Path) -> dict:
    from csg_seg.mm.checkpoints.reading import read_checkpoint

    return read_checkpoint(path)['state_dict']


def assert_same_weights(path: Path, other: Path) -> None:
    ours, theirs = weights(path), weights(other)
    assert ours.keys() == theirs.keys()
    different = [name for name in ours if not torch.equal(ours[name], theirs[name])]
    assert not different


def miou(output: str) -> float:
    return float(re.findall(r'mIoU: ([\d.]+)', output)[-1])


def losses(work_dir: Path) -> list[float]:
    (scalars,) = work_dir.glob('*/vis_data/scalars.json')
    lines = [json.loads(line) for line in scalars.read_text().splitlines()]
    return [line['loss'] for line in lines if 'loss' in line]


def test_loss_falls(run):
    curve = losses(run.work_dir)
    assert len(curve) == ITERS
    quarter = ITERS // 4
    assert max(curve[-quarter:]) < min(curve[:quarter])


def test_log_says_what_is_saved(run):
    (log,) = run.work_dir.glob('*/*.log')
    assert re.search(r'CSG: [\d,]+ parameters stored .* for [\d,]+ dense: [\d.]+x smaller', log.read_text())


def test_killed_and_resumed_run_ends_with_the_weights_of_an_unbroken_one(run):
    work_dir = run.folder / 'killed'
    command = [sys.executable, ROOT / 'tools' / 'train.py', run.config, '--work-dir', work_dir, *run.options]
    training = subprocess.Popen([*map(str, command)], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not (work_dir / 'last_checkpoint').exists():
        assert training.poll() is None, 'training ended before its first checkpoint'
        time.sleep(0.05)
    training.send_signal(signal.SIGKILL)
    training.wait()
    assert not (work_dir / f'iter_{ITERS}.pth').exists()
    run_tool('train.py', run.config, '--work-dir', work_dir, '--resume', *run.options)
    assert_same_weights(work_dir / f'iter_{ITERS}.pth', run.checkpoint)


def test_compact_checkpoint_lies_beside_each_checkpoint_and_scores_the_same(run):
    steps = {path.stem for path in run.work_dir.glob('*.pth')}
    assert steps == {f'iter_{ITERS * third // 3}' for third in (1, 2, 3)}
    assert {path.stem for path in run.work_dir.glob('*.safetensors')} == steps
    compact = run.checkpoint.with_suffix('.safetensors')
    assert_same_weights(run.checkpoint, compact)
    assert run.test(compact) == run.score > 0


def test_materialised_checkpoint_scores_the_same_by_mmsegs_tool_on_the_dense_config(run):
    plain = run.folder / 'plain.pth'
    model_options = cfg_options(SMALL_MODEL)
    run_tool('materialise.py', run.config, run.checkpoint, '--out', plain, *model_options)
    mmseg_test = MMSEG_TOOLS / 'test.py'
    dense = run_script(mmseg_test, run.dense, plain, '--work-dir', run.folder / 'test', *run.options)
    assert 'unexpected key' not in dense.stdout and 'missing keys' not in dense.stdout
    assert miou(dense.stdout) == pytest.approx(run.score, abs=0.01)


def test_mmsegs_own_train_and_test_do_the_same(trained, pytestconfig):
    voc = trained(data_sets(pytestconfig)[0])
    work_dir = voc.folder / 'mmseg'
    run_script(MMSEG_TOOLS / 'train.py', voc.config, '--work-dir', work_dir, *voc.options)
    theirs = work_dir / f'iter_{ITERS}.pth'
    assert_same_weights(theirs, voc.checkpoint)
    by_mmseg = run_script(MMSEG_TOOLS / 'test.py', voc.config, theirs, '--work-dir', work_dir, *voc.options)
    assert miou(by_mmseg.stdout) == voc.score
