"""Every network that an installed library offers: retrofitted, trained for a step, stored, loaded, materialised."""

import json
import multiprocessing
import os
import re
import signal
import statistics
import threading
import time
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import redirect_stderr, redirect_stdout
from fnmatch import fnmatchcase
from importlib import import_module
from importlib.util import find_spec
from itertools import islice
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config

from csg_seg.errors import CSGError
from csg_seg.mm.checkpoints.descriptions import without_weights

from .network import UnreadError, check_network, one_line

SCOPES = ('mmseg', 'mmpretrain', 'torchvision', 'timm')
# Settings of a network that two of its configs may have different.
OTHERWISE = 'data_preprocessor|train_cfg|test_cfg|num_classes|loss.*'
# From good to bad.
RESULTS = ('pass', 'no conv', 'refused', 'not run dense', 'not done', 'fail')
COLUMNS = {'scope', 'name', 'result', 'reason', 'seconds'}
COLUMNS_OF_A_PASS = COLUMNS | {'trains_on', 'generated', 'ratio', 'left_dense'}
PRELOAD = ('csg_seg', 'mmseg.models', 'mmpretrain.models', 'torchvision', 'timm')


def list_networks(scope: str, patterns: Sequence[str] = ('*',)) -> dict[str, Any]:
    """Return what builds each distinct network of a library, by the name of its model or first config.

    Args:
        scope: one of :data:`SCOPES`.
        patterns: of the names, one of which matches.

    Raises:
        CSGError: there is no such scope, its library is not installed, or a pattern names nothing.
    """
    if scope not in SCOPES:
        raise CSGError(f'there is no scope {scope!r}; take one of {", ".join(SCOPES)}')
    if find_spec(scope) is None:
        raise CSGError(f'{scope} is not installed')
    paths: dict[str, Path] = {}
    if scope in ('torchvision', 'timm'):
        models = import_module('torchvision.models' if scope == 'torchvision' else scope)
        names = list(models.list_models())
    else:
        folder = Path(import_module(scope).__file__ or '').parent / '.mim' / 'configs'
        paths = {path.stem: path for path in sorted(folder.rglob('*.py')) if '_base_' not in path.parts}
        names = list(paths)
    chosen = [name for name in names if any(fnmatchcase(name, pattern) for pattern in patterns)]
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise CSGError(f'no network of {scope} is named {pattern}; names look like {names[0]}')
    return _read_networks([paths[name] for name in chosen]) if paths else {name: name for name in chosen}


def _read_networks(paths: Iterable[Path]) -> dict[str, Any]:
    networks: dict[str, Any] = {}
    for path in paths:
        try:
            model = without_weights(Config.fromfile(str(path)).get('model'))
        except Exception as error:  # a config for packages that are not there
            networks[path.stem] = path.stem, UnreadError(one_line(error))
            continue
        key = json.dumps(_network(model), sort_keys=True, default=str)
        if model:
            networks.setdefault(key, (path.stem, model))
    return dict(networks.values())


def check_all(
    scope: str,
    networks: Mapping[str, Any],
    *,
    jobs: int = 1,
    seconds: float = 300.0,
    track: Callable[[Sequence[int]], Iterable[int]] = iter,
) -> Generator[dict[str, Any], None, None]:
    """Return what :func:`csg_seg.mm.zoo_network.check_network` finds of each network, in a process each, as they end.

    Args:
        scope: of the networks.
        networks: of :func:`list_networks`.
        jobs: networks at a time.
        seconds: after which one is given up.
        track: wraps the counts, to show progress.

    Raises:
        CSGError: no network could be checked at a time, or no time is given.
    """
    if jobs < 1 or seconds <= 0:
        raise CSGError(f'cannot check with jobs={jobs}, seconds={seconds:g}: at least one job, and more than 0 seconds')
    return _check_all(scope, networks, jobs, seconds, track)


def _check_all(
    scope: str,
    networks: Mapping[str, Any],
    jobs: int,
    seconds: float,
    track: Callable[[Sequence[int]], Iterable[int]],
) -> Generator[dict[str, Any], None, None]:
    context = multiprocessing.get_context('forkserver')
    context.set_forkserver_preload([name for name in PRELOAD if find_spec(name.split('.')[0])])
    waiting = iter(networks.items())
    running: list[_Check] = []
    try:
        for _ in track(range(len(networks))):
            starting = islice(waiting, jobs - len(running))
            running += [_Check(context, scope, name, spec, seconds) for name, spec in starting]
            done = _first_done(running)
            running.remove(done)
            yield done.row()
    finally:
        for check in running:
            check.stop()


class _Check:
    """The check of one network in a process of its own, which may crash or hang."""

    def __init__(self, context: Any, scope: str, name: str, spec: Any, seconds: float):
        self.scope, self.name, self.seconds = scope, name, seconds
        self.start = time.perf_counter()
        self.receive, send = context.Pipe(duplex=False)
        self.process = context.Process(target=_send, args=(scope, spec, send))
        self.process.start()
        send.close()

    def seconds_left(self) -> float:
        """Return the seconds until the check is given up."""
        return max(0.0, self.start + self.seconds - time.perf_counter())

    def row(self) -> dict[str, Any]:
        """Return what was found, and end the process."""
        row = {'result': 'not done', 'reason': f'it took more than {self.seconds:g} s'}
        try:
            if self.receive.poll():
                row = self.receive.recv()
        except EOFError:
            self.process.join()
            if self.process.exitcode == -signal.SIGKILL:
                row = {'result': 'not done', 'reason': 'its process was killed, perhaps for want of memory'}
            else:
                row = {'result': 'fail', 'reason': f'its process ended with status {self.process.exitcode}'}
        self.stop()
        return {'scope': self.scope, 'name': self.name, **row, 'seconds': round(time.perf_counter() - self.start, 1)}

    def stop(self) -> None:
        """End the process, if it runs still."""
        self.process.kill()
        self.process.join()


def _first_done(running: Sequence[_Check]) -> _Check:
    """Wait for a check that has sent its row, has died or is given up."""
    while True:
        wait([check.receive for check in running], timeout=min(check.seconds_left() for check in running))
        for check in running:
            if check.receive.poll() or not check.seconds_left():
                return check


def read_rows(path: Path, scope: str) -> list[dict[str, Any]]:
    """Return the rows that a run has written so far, none if there is no such file.

    Raises:
        CSGError: a line holds none, or one of another library.
    """
    rows = []
    try:
        lines = path.read_text().splitlines() if path.exists() else []
    except UnicodeDecodeError:
        raise CSGError(f'{path} is no text; take another file') from None
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        wanted = COLUMNS_OF_A_PASS if isinstance(row, dict) and row.get('result') == 'pass' else COLUMNS
        if not isinstance(row, dict) or not wanted <= row.keys():
            raise CSGError(f'{path}: line {number} is no row of such a check; delete the line, or take another file')
        if row['scope'] != scope:
            raise CSGError(f'{path}: line {number} is of {row["scope"]}; take another file for {scope}')
        rows.append(row)
    return rows


def summarise_rows(rows: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Return what a table of rows comes to.

    Returns:
        ``results``, the count of each of :data:`RESULTS`; of the networks that passed, ``on_losses``, how many of
        them trained on losses, ``generated``, the count of their convs, ``left_dense``, that of convs for each
        reason, and ``ratio``, smallest, median and largest, if any passed.
    """
    rows = list(rows)
    passed = [row for row in rows if row['result'] == 'pass']
    left: Counter[str] = Counter()
    for row in passed:
        left.update(row['left_dense'])
    ratios = [row['ratio'] for row in passed]
    return {
        'results': {result: sum(row['result'] == result for row in rows) for result in RESULTS},
        'on_losses': sum(row['trains_on'] == 'losses' for row in passed),
        'generated': sum(row['generated'] for row in passed),
        'left_dense': left,
        'ratio': (min(ratios), statistics.median(ratios), max(ratios)) if ratios else (),
    }


def _network(value: Any) -> Any:
    """Return of a config what makes the network another one: no data, no losses, no number of classes."""
    if isinstance(value, Mapping):
        return {key: _network(each) for key, each in value.items() if not re.fullmatch(OTHERWISE, key)}
    if isinstance(value, (list, tuple)):
        return [_network(each) for each in value]
    return 'BN' if value == 'SyncBN' else value


def _send(scope: str, spec: Any, connection: Any) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # it is ended by the process that began it
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(1)
    with Path(os.devnull).open('w') as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
        row = check_network(scope, spec)
    connection.send(row)


def _end_with_parent() -> None:
    """End this process when the one that began it has died, of SIGKILL for one."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
