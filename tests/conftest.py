"""Fixtures that all tests share: real data if given, drawn data, and tools run as a user runs them."""

import gc
import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from mmengine.logging import MessageHub, MMLogger
from mmengine.visualization import Visualizer
from yapf.yapflib import yapf_api

ROOT = Path(__file__).parents[1]

# Importing the libraries takes longer than running most tools, so tools are forked from a process that has them.
PROCESSES = multiprocessing.get_context('forkserver')
PROCESSES.set_forkserver_preload(['csg_seg.running.preflight', 'mmseg.apis', 'mmpretrain.apis'])

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


def pytest_collection_finish():
    skip_slow_library_work()  # after every import


def pytest_unconfigure():
    gc.unfreeze()  # or libraries report what is never collected as leaks


def skip_slow_library_work() -> None:
    """Leave configs that mmengine writes unformatted, and keep what is imported out of garbage collections.

    mmengine formats a config four times in each run and collects garbage for each data set, which took a third of the
    time of a test that trains.
    """
    yapf_api.FormatCode = lambda text, **kwargs: (text, True)
    gc.freeze()


@pytest.fixture(autouse=True)
def own_logs():
    """Let no run write into the log of an earlier test: mmengine names runs of one config by the second."""
    yield
    for kind in (MMLogger, MessageHub, Visualizer):
        kind._instance_dict.clear()


@pytest.fixture(scope='session')
def real_data(request) -> Path:
    """The folder of real data. If it is given but incomplete, the test fails."""
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
    from csg_seg.data.drawn import draw_dataset

    return draw_dataset(tmp_path_factory.mktemp('drawn'), train=16, val=6, size=64)


def cfg_options(options: dict) -> list[str]:
    """Write a dict of settings as arguments of a tool."""
    return ['--cfg-options', *(f'{key}={str(value).replace(" ", "")}' for key, value in options.items())]


def run_program(*command, check: bool = True, **kwargs) -> subprocess.CompletedProcess:
    """Run a program of the project from its root and capture what it prints."""
    done = subprocess.run([*map(str, command)], cwd=ROOT, text=True, capture_output=True, **kwargs)
    assert not check or done.returncode == 0, f'{command}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}'
    return done


def run_script(path: str | Path, *args, check: bool = True) -> subprocess.CompletedProcess:
    """Run a Python program from the project's root, in a process of its own, and capture what it prints."""
    command = [*map(str, (path, *args))]
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder, name) for name in ('stdout', 'stderr')]
        process = PROCESSES.Process(target=_become, args=(command, files, dict(os.environ)))
        process.start()
        process.join()
        printed = [file.read_text() for file in files]
    done = subprocess.CompletedProcess(command, process.exitcode, *printed)
    assert not check or done.returncode == 0, f'{command}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}'
    return done


def _become(command: list[str], files: list[Path], environment: dict[str, str]) -> None:
    for descriptor, file in enumerate(files, start=1):
        os.dup2(os.open(file, os.O_CREAT | os.O_WRONLY), descriptor)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(ROOT)
    sys.argv = command
    skip_slow_library_work()
    sys.path[0] = str(ROOT if command[0].startswith('experiments.') else Path(command[0]).parent)
    run_main(command[0])


def run_main(program: str) -> None:
    """Run a file, or a package of ``experiments``, as the main program of this process."""
    if program.startswith('experiments.'):
        runpy.run_module(program, run_name='__main__', alter_sys=True)
    else:
        runpy.run_path(program, run_name='__main__')


def run_experiment(name: str, *args, check: bool = True) -> subprocess.CompletedProcess:
    """Run ``python -m experiments.NAME``."""
    return run_script(f'experiments.{name}', *args, check=check)


def run_tool(name: str, *args, check: bool = True) -> subprocess.CompletedProcess:
    """Run ``tools/NAME``."""
    return run_script(ROOT / 'tools' / name, *args, check=check)


@pytest.fixture
def refused(monkeypatch, capsys):
    """Run a tool, or ``experiments.NAME``, in this process and return the one line it ends with."""

    def call(tool: str, *args) -> str:
        program = tool if tool.startswith('experiments.') else str(ROOT / 'tools' / tool)
        monkeypatch.setattr(sys, 'argv', [program, *map(str, args)])
        with pytest.raises(SystemExit) as end:
            run_main(program)
        capsys.readouterr()
        message = str(end.value.code)
        assert message.startswith('error: ') and '\n' not in message
        return message

    return call
