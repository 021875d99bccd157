"""Long checks, run by ``make check-full``."""

import json
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
