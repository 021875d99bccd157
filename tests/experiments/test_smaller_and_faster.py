"""Trained networks as ONNX files in float32 and int8, and the page about them."""

import json
import re
import shutil
import sys

import mmcv
import numpy as np
import onnxruntime
import pytest
import torch
from conftest import ROOT
from mmengine.runner import Runner
from test_runs import CSG, DENSE_CELL, table_file

from csg_seg.errors import CSGError
from csg_seg.mm.checkpoints.reading import load_weights, read_checkpoint
from csg_seg.mm.checkpoints.writing import write_with_config
from csg_seg.mm.model import build_model
from csg_seg.report import summarise
from csg_seg.running.configs import read_config
from experiments.runs.table import read_table
from experiments.runs.training import Run
from experiments.smaller_and_faster.__main__ import print_networks
from experiments.smaller_and_faster.int8 import has_vnni, quantise
from experiments.smaller_and_faster.measure import measure_networks, training_images

CELLS = [DENSE_CELL, {'name': 'csg', 'method': 'csg', 'csg': CSG}]


@pytest.fixture(scope='module')
def measured(tmp_path_factory, drawn):
    """Runs, the files of a CSG network with start values, and its figures."""
    place = tmp_path_factory.mktemp('measured')
    (place / 'drawn').symlink_to(drawn.parent)
    table = read_table(table_file(place, CELLS))
    runs = {cell.name: Run(table, cell, data=place, work_dir=place / 'work') for cell in table.cells}
    folder = runs['csg'].folder
    folder.mkdir(parents=True)
    torch.manual_seed(0)
    torch.save({'state_dict': build_model(runs['csg'].cfg).state_dict()}, folder / 'iter_6.pth')
    (folder / 'last_checkpoint').write_text(str(folder / 'iter_6.pth'))
    (folder / 'test.json').write_text('{}')
    return runs, place, measure_networks([runs['csg']], place, calibration=4, rounds=2)


def relative_error(run, file, other):
    """Return how far the scores of two files differ on a training image."""
    image = mmcv.imread(training_images(run.cfg, 1)[0]).transpose(2, 0, 1)[None]
    image = {'image': (image.astype(np.float32) - 120) / 58}
    wanted, got = (onnxruntime.InferenceSession(each).run(None, image)[0] for each in (file, other))
    return np.linalg.norm(got - wanted) / np.linalg.norm(wanted)


def test_an_int8_file_is_small_and_computes_nearly_the_same(measured):
    runs, place, networks = measured
    csg = networks['csg']
    assert csg['stored_params'] < csg['shipped_bytes'] < csg['dense_params'] < csg['flops']
    assert csg['onnx']['int8']['bytes'] < 0.4 * csg['onnx']['float32']['bytes']
    assert all(onnx['milliseconds'] > 0 for onnx in csg['onnx'].values())
    assert 0 < relative_error(runs['csg'], place / 'csg-s0-float32.onnx', place / 'csg-s0-int8.onnx') < 0.1


def test_a_float32_file_scores_as_its_network_does(measured, tmp_path):
    runs, place, networks = measured
    cfg = runs['csg'].cfg
    cfg.work_dir, cfg.load_from = str(tmp_path), str(place / 'csg-s0.pth')
    scores = Runner.from_cfg(cfg).test()
    assert networks['csg']['onnx']['float32']['test'] == pytest.approx(scores['mIoU'], abs=0.02)
    assert scores['mIoU'] > 0


def test_calibration_images_are_spread_over_the_training_images(measured):
    runs, *_ = measured
    every = training_images(runs['dense'].cfg, 1000)
    assert len(every) == 16 and training_images(runs['dense'].cfg, 4) == every[::4]


def test_a_network_has_a_line_for_each_format(measured, capsys):
    *_, networks = measured
    print_networks({'networks': json.loads(json.dumps(networks))})
    printed = capsys.readouterr().out
    assert printed.count('float32') == printed.count('int8') == 1


def test_quantising_without_images_is_refused(measured, tmp_path):
    _, place, _ = measured
    with pytest.raises(CSGError, match='no images to calibrate on; give some of the training images'):
        quantise(place / 'csg-s0-float32.onnx', [], tmp_path / 'x.onnx')
    assert not list(tmp_path.iterdir())


def test_networks_that_cannot_be_measured_are_refused(measured, tmp_path):
    runs, *_ = measured
    with pytest.raises(CSGError, match='dense-s0 is not trained; run experiments.runs with the same --work-dir'):
        measure_networks([runs['dense']], tmp_path, calibration=4, rounds=1)
    with pytest.raises(CSGError, match='--calibration and --rounds must be at least 1'):
        measure_networks([runs['csg']], tmp_path, calibration=0, rounds=1)


def test_onnxruntime_that_is_missing_is_named(refused, monkeypatch):
    for name in [each for each in sys.modules if each.startswith('experiments.smaller_and_faster')]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, 'onnxruntime', None)
    message = refused('experiments.smaller_and_faster', 'table.yml')
    assert message.startswith("error: onnxruntime is not installed; pip install '.[mm,onnx]'")


def examples():
    text = (ROOT / 'docs' / 'smaller_and_faster.md').read_text()
    return re.findall(r'```python\n(.*?)```', text, flags=re.DOTALL)


def test_the_example_of_the_page_quantises_a_file(measured, tmp_path, monkeypatch):
    runs, place, _ = measured
    monkeypatch.chdir(tmp_path)
    images = tmp_path / 'data' / 'camvid' / 'images' / 'train'
    images.mkdir(parents=True)
    for position, file in enumerate(training_images(runs['csg'].cfg, 3)):
        mmcv.imwrite(mmcv.imread(file), str(images / f'{position}.jpg'))
    model = build_model(runs['csg'].cfg)
    load_weights(model, read_checkpoint(place / 'csg-s0.pth')['state_dict'])
    write_with_config(model, model.state_dict(), tmp_path / 'small.safetensors', runs['csg'].cfg, {})
    shutil.copy(place / 'csg-s0-float32.onnx', 'network.onnx')
    example = examples()[0]
    if not has_vnni():  # as the page advises
        example = example.replace('per_channel=True', 'per_channel=True, reduce_range=True')
    exec(example, {'__name__': 'example'})
    assert 0 < relative_error(runs['csg'], 'network.onnx', 'int8.onnx') < 0.1
    metadata = (onnxruntime.InferenceSession(file).get_modelmeta() for file in ('network.onnx', 'int8.onnx'))
    before, after = (each.custom_metadata_map for each in metadata)
    assert before['mean'] == after['mean'] and before['channels'] == after['channels']


def test_the_configs_of_the_page_are_the_cells_of_the_table(tmp_path):
    _, narrow, small = examples()
    (tmp_path / 'narrow.py').write_text(narrow.replace("'configs/", f"'{ROOT}/configs/"))
    (tmp_path / 'small.py').write_text(small)
    table = read_table(ROOT / 'experiments' / 'runs' / 'tables' / 'camvid_small.yml')
    for name, stored, label in (('narrow', 1_368_812, 'narrow-10x-s0'), ('small', 340_877, 'narrow-csg-41x-s0')):
        (cell,) = table.matching([label])
        ours = cell.read_config()
        cfg = read_config(tmp_path / f'{name}.py')
        for each in (cfg, ours):
            assert summarise(build_model(each)).stored_params == stored
        assert cfg.optim_wrapper == ours.optim_wrapper and cfg.train_cfg.max_epochs == ours.train_cfg.max_epochs
        assert cfg.param_scheduler == ours.param_scheduler
        assert dict(cfg.model.get('teacher', {}), checkpoint='') == dict(ours.model.get('teacher', {}), checkpoint='')
