"""The runner of tables of trainings."""

import json
import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch
import yaml
from conftest import ROOT, SMALL_MODEL, run_experiment

from csg_seg.errors import CSGError
from experiments import markdown
from experiments.runs import __main__ as main
from experiments.runs import picture, summary, training
from experiments.runs.picture import draw_scores
from experiments.runs.rows import add_row, read_rows, summarise
from experiments.runs.table import read_table
from experiments.runs.training import Run

CONFIG = 'configs/demo/deeplabv3_r18-d8-w32_drawn-voc-64x64.py'
CSG = {'slice_shape': [4, 4, 3, 3], 'code_dim': 8}
SHORT = {
    **{key: list(value) if isinstance(value, tuple) else value for key, value in SMALL_MODEL.items()},
    'train_cfg.max_iters': 6,
    'train_dataloader.batch_size': 2,
    'default_hooks.checkpoint.interval': 2,
    'default_hooks.logger.interval': 1,
}


def table_file(tmp_path, cells, **changes):
    defaults = {'network': 'deeplabv3', 'size': '64x64', 'config': CONFIG, 'options': SHORT}
    content = {'dataset': 'drawn', 'metric': 'mIoU', 'defaults': defaults, 'cells': cells, **changes}
    path = tmp_path / 'table.yml'
    path.write_text(yaml.safe_dump(content))
    return path


DENSE_CELL = {'name': 'dense', 'method': 'dense'}


def arguments(tmp_path, table, drawn, *args):
    (tmp_path / 'data').mkdir(exist_ok=True)
    if not (tmp_path / 'data' / 'drawn').exists():
        (tmp_path / 'data' / 'drawn').symlink_to(drawn.parent)
    folders = ['--data', tmp_path / 'data', '--work-dir', tmp_path / 'work', '--results', tmp_path / 'results']
    return [*map(str, [table, *folders, *args])]


def run(*args):
    return run_experiment('runs', *arguments(*args), check=False)


def test_cells_are_trained_once_and_start_from_one_another(tmp_path, drawn):
    options = {**SHORT, 'load_from': 'cell:dense'}
    carried = {'name': 'carried', 'method': 'csg', 'csg': CSG, 'options': options, 'amp': True}
    broken = {'name': 'broken', 'method': 'dense', 'options': {**SHORT, 'load_from': 'nowhere.pth'}}
    table = table_file(tmp_path, [DENSE_CELL, broken, carried])
    file = tmp_path / 'results' / 'drawn.json'
    done = run(tmp_path, table, drawn, '--only', 'broken', 'carried', '--float32')
    assert done.returncode == 1
    assert 'broken-s0: failed: ' in done.stderr and 'nowhere.pth' in done.stderr
    assert done.stderr.strip().endswith('error: 1 of 2 cells failed: broken-s0')
    rows = read_rows(file)
    assert [row['cell'] for row in rows] == ['dense', 'carried']  # carried needs dense
    dense, csg = rows
    assert csg['dense_params'] == dense['stored_params'] > csg['stored_params']
    assert csg['starts_from'] == {'dense-s0': {split: dense[split] for split in ('val', 'test')}}
    assert 'starts_from' not in dense
    for row in rows:
        assert row['precision'] == 'float32'
        assert row['test'] == row['scores']['test']['mIoU'] and row['seconds'] > 0 and row['commit']
        assert row['stored_params'] < row['int8']['bytes'] < 2 * row['stored_params']
        assert row['int8']['test'] == pytest.approx(row['test'], abs=2)
    assert dense['command'].endswith(f'{table} --only dense-s0')
    assert csg['command'].endswith(f'{table} --only carried-s0 --float32')
    config = (tmp_path / 'work' / 'drawn' / 'carried-s0.py').read_text()
    assert "dense-s0/iter_6.pth'" in config and 'cell:' not in config
    before = file.stat().st_mtime_ns
    again = run(tmp_path, table, drawn, '--only', 'carried', '--float32', '--json')
    assert again.returncode == 0 and json.loads(again.stdout) == [csg]
    assert file.stat().st_mtime_ns == before


def test_without_bfloat16_the_runner_asks_for_float32(tmp_path, monkeypatch):
    monkeypatch.setattr(training, 'get_device', lambda: 'cpu')
    monkeypatch.setattr(training, 'has_bfloat16', lambda: False)
    table = read_table(table_file(tmp_path, [{**DENSE_CELL, 'amp': True}]))
    with pytest.raises(CSGError, match='dense-s0 trains in bfloat16, and this CPU .*; give --float32'):
        Run(table, table.cells[0], data=tmp_path, work_dir=tmp_path).check()


def test_a_cell_starts_from_one_of_another_data_set(tmp_path, drawn):
    table = table_file(
        tmp_path, [DENSE_CELL, {**DENSE_CELL, 'name': 'on', 'options': {'load_from': 'cell:other/base'}}]
    )
    parsed = read_table(table)
    (cell,) = parsed.matching(['on'])
    assert cell.needs == () and cell.needs_elsewhere == ('other/base-s0',)
    run = Run(parsed, cell, data=tmp_path, work_dir=tmp_path / 'work')
    with pytest.raises(CSGError, match='on-s0 needs base-s0 of the data set other; first train it with its own table'):
        run.check_elsewhere()
    folder = tmp_path / 'work' / 'other' / 'base-s0'
    folder.mkdir(parents=True)
    for name in ('iter_6.pth', 'test.json', 'last_checkpoint'):
        (folder / name).write_text(str(folder / 'iter_6.pth'))
    assert run.check_elsewhere() == {'other/base-s0': str(folder / 'iter_6.pth')}


@pytest.mark.full
def test_a_killed_runner_resumes_to_the_same_weights(tmp_path, drawn):
    table = table_file(tmp_path, [DENSE_CELL])
    weights = {}
    for name in ('unbroken', 'killed'):
        folder = tmp_path / name
        folder.mkdir()
        if name == 'killed':
            command = [sys.executable, '-m', 'experiments.runs', *arguments(folder, table, drawn)]
            process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL, start_new_session=True)
            deadline = time.monotonic() + 120
            while not list(folder.glob('work/drawn/dense-s0/iter_*.pth')) and time.monotonic() < deadline:
                time.sleep(0.05)
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            assert not (folder / 'results').exists()
        done = run(folder, table, drawn)
        assert done.returncode == 0, done.stderr
        checkpoint = torch.load(folder / 'work' / 'drawn' / 'dense-s0' / 'iter_6.pth', weights_only=False)
        weights[name] = checkpoint['state_dict']
        (row,) = read_rows(folder / 'results' / 'drawn.json')
        weights[name]['score'] = torch.tensor(row['test'])
    assert weights['unbroken'].keys() == weights['killed'].keys()
    for key, value in weights['unbroken'].items():
        assert torch.equal(value, weights['killed'][key]), key


def test_epochs_stretch_the_schedule(tmp_path):
    config = 'configs/deeplabv3/deeplabv3_r18-d16_1xb8-80e_camvid-180x240.py'
    cell = {**DENSE_CELL, 'config': config, 'epochs': 160, 'options': {}}
    cfg = read_table(table_file(tmp_path, [cell])).cells[0].read_config()
    assert cfg.train_cfg.max_epochs == cfg.train_cfg.val_interval == cfg.param_scheduler[1].end == 160
    assert cfg.param_scheduler[0].end == 100  # iterations of warm-up


def test_epochs_that_the_warm_up_takes_are_refused(tmp_path):
    config = 'configs/cifar10/resnet20_b64-20e_cifar10-npz.py'
    cell = read_table(table_file(tmp_path, [{**DENSE_CELL, 'config': config, 'epochs': 1, 'options': {}}])).cells[0]
    with pytest.raises(CSGError, match='epochs: 1 ends before CosineAnnealingLR begins; give more'):
        cell.read_config()


def test_the_data_folder_replaces_data_in_every_loader(tmp_path):
    table = read_table(table_file(tmp_path, [DENSE_CELL]))
    cfg = Run(table, table.cells[0], data=tmp_path / 'mine', work_dir=tmp_path).cfg
    for split in ('train', 'val', 'test'):
        assert cfg[f'{split}_dataloader'].dataset.data_root.startswith(str(tmp_path / 'mine' / 'drawn'))


@pytest.mark.parametrize(
    ('cells', 'changes', 'says'),
    [
        ([DENSE_CELL], {'metrics': 1}, "unknown key 'metrics'"),
        ([{**DENSE_CELL, 'seed': 1}], {}, "cell dense: unknown key 'seed'"),
        ([{'name': 'dense'}], {}, 'cell dense: the key method is missing'),
        ([{**DENSE_CELL, 'seeds': 1}], {}, 'seeds must be a list'),
        ([DENSE_CELL, DENSE_CELL], {}, 'two cells are named dense-s0'),
        ([{**DENSE_CELL, 'method': 'csg'}], {}, 'has no cell of method dense'),
        ([{**DENSE_CELL, 'options': {'load_from': 'cell:csg'}}], {}, 'needs csg-s0, which is not above it'),
        ([], {}, 'cells must be a list'),
    ],
)
def test_a_table_that_says_something_wrong_is_refused(tmp_path, cells, changes, says):
    with pytest.raises(CSGError, match=says):
        read_table(table_file(tmp_path, cells, **changes))


def test_arguments_that_are_wrong(refused, tmp_path):
    assert 'no such table; there are experiments' in refused('experiments.runs', tmp_path / 'none.yml')
    table = table_file(tmp_path, [DENSE_CELL])
    assert 'matches no cell' in refused('experiments.runs', table, '--only', 'csg*')
    folders = ['--data', tmp_path, '--work-dir', tmp_path / 'work', '--results', tmp_path]
    assert 'at least one cell at a time' in refused('experiments.runs', table, '--jobs', '0', *folders)
    assert 'does not exist' in refused('experiments.runs', table, *folders)  # the data
    assert not (tmp_path / 'work').exists()


def test_the_table_and_the_picture_show_every_cell_of_a_network(tmp_path, monkeypatch):
    rows = []
    for cell, method, stored in (('dense', 'dense', 100), ('csg-10x', 'csg', 10), ('narrow-10x', 'narrow', 9)):
        for seed in (0, 1):
            row = dict(cell=cell, network='n', method=method, size='8x8', metric='mIoU', epochs=2, dense_params=100)
            row |= {'int8': {'bytes': 120_000, 'test': 39.0}} if cell == 'csg-10x' else {}
            rows.append(row | dict(stored_params=stored, seed=seed, val=50.0 + seed, test=40.0, seconds=60))
    table = table_file(tmp_path, [DENSE_CELL, *({**DENSE_CELL, 'name': name} for name in ('csg-10x', 'narrow-10x'))])
    rows.append(rows[-1] | {'cell': 'other', 'network': 'm'})
    monkeypatch.setattr(markdown, 'RESULT_FILES', tmp_path)
    (tmp_path / 'drawn.json').write_text(json.dumps({'rows': rows}))
    (tmp_path / 'peers.json').write_text(json.dumps({'networks': {'dense': {'flops': 2.5e9, 'step_ratio': 1.0}}}))
    lines = summary.runs(str(table), costs='peers').splitlines()
    assert lines[2:] == [
        '| dense | 100 | 1.0x | 2 | 2 | 50.50±0.71 | 40.00±0.00 |  |  | 2.50 | 1.00x |',
        '| csg-10x | 10 | 10.0x | 2 | 2 | 50.50±0.71 | 40.00±0.00 | 0.12 | 39.00±0.00 |  |  |',
        '| narrow-10x | 9 | 11.1x | 2 | 2 | 50.50±0.71 | 40.00±0.00 |  |  |  |  |',
    ]
    figures = []
    monkeypatch.setattr(picture, 'save_figure', lambda figure, path: figures.append(figure))
    draw_scores(rows, tmp_path / 'p.png', network='n', size='8x8')
    (figure,) = figures
    assert [axis.get_title() for axis in figure.axes] == ['n, 8x8, val', 'n, 8x8, test']
    names = [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
    assert names == ['dense', 'csg', 'narrow']


@pytest.fixture
def three_rows(tmp_path):
    """A table of a dense and a CSG network, and a file of results with a third one."""
    common = dict(network='n', size='s', metric='x', epochs=1, stored_params=1, dense_params=2, seed=0, seconds=60)
    rows = [dict(common, cell=name, method=name, val=1.0, test=1.0) for name in ('dense', 'csg', 'other')]
    (tmp_path / 'drawn.json').write_text(json.dumps({'rows': rows}))
    return table_file(tmp_path, [DENSE_CELL, {**DENSE_CELL, 'name': 'csg'}])


@pytest.mark.parametrize(('only', 'shown'), [([], ['dense', 'csg', 'other']), (['--only', 'dense'], ['dense'])])
def test_only_chooses_what_the_picture_shows(three_rows, only, shown, tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(picture, 'save_figure', lambda figure, path: figures.append(figure))
    arguments = [three_rows, '--dry-run', '--results', tmp_path, '--picture', tmp_path / 'p.png', *only]
    monkeypatch.setattr(sys, 'argv', ['experiments.runs', *map(str, arguments)])
    main.main()
    assert [text.get_text() for text in figures[0].axes[0].get_legend().get_texts()] == shown


def test_a_picture_without_the_dense_network_is_refused(three_rows, tmp_path, refused):
    arguments = ['--dry-run', '--results', tmp_path, '--picture', tmp_path / 'p.png', '--only', 'csg']
    assert 'add its cell to --only' in refused('experiments.runs', three_rows, *arguments)
    assert not (tmp_path / 'p.png').exists()


def test_rows_are_ordered_by_the_table_and_summarised_over_seeds(tmp_path):
    common = dict(network='n', method='m', size='s', metric='x', epochs=1, stored_params=1, dense_params=2, seconds=60)
    file = tmp_path / 'rows.json'
    for cell, seed, val, test in (('b', 1, 3.0, 5.0), ('b', 0, 1.0, 1.0), ('a', 0, None, 2.0), ('b', 0, 1.0, 3.0)):
        add_row(file, dict(common, cell=cell, seed=seed, val=val, test=test), order=['a-s0', 'b-s0'])
    rows = read_rows(file)
    assert [(row['cell'], row['seed']) for row in rows] == [('a', 0), ('b', 0), ('b', 1)]
    one, several = summarise(rows)
    assert one['val'] is None and one['test'] == (2.0, None)
    assert several['seeds'] == 2 and several['val'] == (2.0, 2**0.5) and several['test'] == (4.0, 2**0.5)


def test_the_time_for_which_a_training_was_suspended_is_left_out():
    logged = [dict(step=50, time=2.0), dict(step=100, time=500.0), dict(step=150, time=2.25)]
    assert Run._training_seconds(SimpleNamespace(_logged=lambda: logged)) == 150 * 2.25
