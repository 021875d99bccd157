"""Long checks, run by ``make check-full``."""

import json
import sys
import time

import pytest
from conftest import ROOT, run_program

pytestmark = pytest.mark.full


def test_demo_keeps_its_promises(tmp_path):
    start = time.monotonic()
    printed = run_program('make', 'demo').stdout
    assert time.monotonic() - start < 6 * 60
    result = json.loads((ROOT / 'work_dirs' / 'demo' / 'result.json').read_text())
    assert result['dense']['mIoU'] > 45
    assert result['csg']['mIoU'] > 35
    assert result['compression_ratio'] > 6
    for file in result['files'].values():
        assert (ROOT / file['path']).stat().st_size == file['bytes']
        assert file['path'] in printed
    assert printed.splitlines()[-1] == 'drawn: work_dirs/demo/seen.png'


FIT = """
import json, resource, time
import torch
from csg_seg import fit, materialise
from csg_seg.running.configs import read_config
from csg_seg.mm.model import build_model

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

torch.set_num_threads(2)
cfg = read_config('configs/deeplabv3/csg-s16-d128_deeplabv3_r101-d8_4xb4-20k_voc12-512x512.py')
cfg.model.pretrained = None
weights = materialise(build_model(cfg)).state_dict()
model = build_model(cfg)
with open('/proc/self/statm') as file:
    before = int(file.read().split()[1]) * resource.getpagesize()
start = time.monotonic()
layers = len(fit(model, weights))
print(json.dumps(dict(layers=layers, seconds=time.monotonic() - start, bytes=peak() - before)))
"""


def test_the_fit_of_deeplabv3_r101_takes_a_minute_and_two_gigabytes_at_most():
    found = json.loads(run_program(sys.executable, '-c', FIT).stdout.splitlines()[-1])
    assert found['layers'] == 40
    assert found['seconds'] < 60
    assert found['bytes'] < 2e9
