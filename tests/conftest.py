"""Shared fixtures: real data when it is given, drawn data always, tools as a user calls them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# A narrow network on small crops, so that a test takes seconds; the rest of the config stays real.
SMALL_MODEL = {
    'model.pretrained': None,
    'model.backbone.stem_channels': 16,
    'model.backbone.base_channels': 16,
    'model.decode_head.in_channels': 128,
    'model.decode_head.channels': 32,
    'model.auxiliary_head.in_channels': 64,
    'model.auxiliary_head.channels': 16,
    'model.data_preprocessor.size': (64, 64),
}


def pytest_addoption(parser):
    parser.addoption(
        '--data-root',
        default=os.environ.get('CSG_SEG_DATA'),
        help='folder that holds data/VOCdevkit and data/camvid (default: $CSG_SEG_DATA)',
    )


@pytest.fixture(scope='session')
def real_data(request) -> Path:
    """The folder of real data; given but incomplete is a failure, not a reason to skip."""
    given = request.config.getoption('--data-root')
    if not given:
        pytest.skip('real data: give --data-root or CSG_SEG_DATA')
    root = Path(given) / 'data'
    for part in ('VOCdevkit/VOC2012/JPEGImages', 'camvid/images'):
        assert (root / part).is_dir(), f'--data-root {given}: {root / part} is missing'
    return root


@pytest.fixture(scope='session')
def drawn(tmp_path_factory) -> Path:
    """A small drawn VOC."""
    from csg_seg.drawing import draw_dataset

    return draw_dataset(tmp_path_factory.mktemp('drawn'), train=16, val=6, size=64)


def cfg_options(options: dict) -> list[str]:
    """Write a dict of settings as arguments of a tool."""
    return ['--cfg-options', *(f'{key}={str(value).replace(" ", "")}' for key, value in options.items())]


def run_program(*command, check: bool = True, **kwargs) -> subprocess.CompletedProcess:
    """Run a program of the project from its root and capture what it prints."""
    done = subprocess.run([*map(str, command)], cwd=ROOT, text=True, capture_output=True, **kwargs)
    assert not check or done.returncode == 0, f'{command}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}'
    return done


def run_tool(name: str, *args, **kwargs) -> subprocess.CompletedProcess:
    """Run ``tools/NAME``."""
    return run_program(sys.executable, ROOT / 'tools' / name, *args, **kwargs)
