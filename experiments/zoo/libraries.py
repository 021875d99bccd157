"""The networks of an installed library, each checked in its own process."""

import json
import multiprocessing
import os
import re
import signal
import threading
import time
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
from .sources import list_sources

# Import name of each scope's library.
SCOPES = {
    **{name: name for name in ('mmseg', 'mmpretrain', 'torchvision', 'timm', 'monai', 'transformers')},
    'smp': 'segmentation_models_pytorch',
}
# Settings that may differ between two configs of one network.
OTHERWISE = 'data_preprocessor|train_cfg|test_cfg|num_classes|loss.*'
PRELOAD = ('csg_seg', 'mmseg.models', 'mmpretrain.models', 'torchvision', 'timm')


def list_networks(scope: str, patterns: Sequence[str] = ('*',)) -> dict[str, Any]:
    """Return the model name, source or config of each distinct network of a library, by name.

    Args:
        scope: one of :data:`SCOPES`.
        patterns: shell-style patterns; a network is included if one matches its name.

    Raises:
        CSGError: the scope is unknown, its library is not installed, or a pattern matches nothing.
    """
    if scope not in SCOPES:
        raise CSGError(f'there is no scope {scope!r}; choose from {", ".join(SCOPES)}')
    if find_spec(SCOPES[scope]) is None:
        raise CSGError(f'{SCOPES[scope]} is not installed; docs/supported.md has the command that installs it')
    networks = _networks(scope)
    names = list(networks)
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise CSGError(f'no network of {scope} is named {pattern}; names look like {names[0]}')
    chosen = {name: spec for name, spec in networks.items() if any(fnmatchcase(name, pattern) for pattern in patterns)}
    return _read_networks(chosen.values()) if scope in ('mmseg', 'mmpretrain') else chosen


def _networks(scope: str) -> dict[str, Any]:
    """Return the name, source or config file of each network of a library, by name."""
    if scope in ('torchvision', 'timm'):
        models = import_module('torchvision.models' if scope == 'torchvision' else scope)
        return {name: name for name in models.list_models()}
    if scope in ('mmseg', 'mmpretrain'):
        folder = Path(import_module(scope).__file__ or '').parent / '.mim' / 'configs'
        return {path.stem: path for path in sorted(folder.rglob('*.py')) if '_base_' not in path.parts}
    return list_sources(scope)


def _read_networks(paths: Iterable[Path]) -> dict[str, Any]:
    networks: dict[str, Any] = {}
    for path in paths:
        try:
            model = without_weights(Config.fromfile(str(path)).get('model'))
        except Exception as error:  # the config needs packages that are not installed
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
    """Check each network with :func:`experiments.zoo.network.check_network`, in its own process.

    Yields rows in the order in which the checks end.

    Args:
        scope: library of the networks.
        networks: result of :func:`list_networks`.
        jobs: number of networks at a time.
        seconds: time limit of a network.
        track: wraps a range, to show progress.

    Raises:
        CSGError: ``jobs`` or ``seconds`` is out of range.
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
    context.set_forkserver_preload([name for name in (*PRELOAD, SCOPES[scope]) if find_spec(name.split('.')[0])])
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
    """The check of one network, in its own process because it may crash or hang."""

    def __init__(self, context: Any, scope: str, name: str, spec: Any, seconds: float):
        self.scope, self.name, self.seconds = scope, name, seconds
        self.start = time.perf_counter()
        self.receive, send = context.Pipe(duplex=False)
        self.process = context.Process(target=_send, args=(scope, spec, send))
        self.process.start()
        send.close()

    def seconds_left(self) -> float:
        """Return the seconds until the time limit."""
        return max(0.0, self.start + self.seconds - time.perf_counter())

    def row(self) -> dict[str, Any]:
        """Return the result, and end the process."""
        row = {'result': 'not done', 'reason': f'it took more than {self.seconds:g} s'}
        try:
            if self.receive.poll():
                row = self.receive.recv()
        except EOFError:
            self.process.join()
            if self.process.exitcode == -signal.SIGKILL:
                row = {'result': 'not done', 'reason': 'its process was killed, perhaps because memory ran out'}
            else:
                row = {'result': 'fail', 'reason': f'its process ended with status {self.process.exitcode}'}
        self.stop()
        return {'scope': self.scope, 'name': self.name, **row, 'seconds': round(time.perf_counter() - self.start, 1)}

    def stop(self) -> None:
        """End the process if it is still running."""
        self.process.kill()
        self.process.join()


def _first_done(running: Sequence[_Check]) -> _Check:
    """Wait for a check that has sent its row, has died, or has reached its time limit."""
    while True:
        wait([check.receive for check in running], timeout=min(check.seconds_left() for check in running))
        for check in running:
            if check.receive.poll() or not check.seconds_left():
                return check


def _network(value: Any) -> Any:
    """Return the part of a config that defines the network, without data, losses and number of classes."""
    if isinstance(value, Mapping):
        return {key: _network(each) for key, each in value.items() if not re.fullmatch(OTHERWISE, key)}
    if isinstance(value, (list, tuple)):
        return [_network(each) for each in value]
    return 'BN' if value == 'SyncBN' else value


def _send(scope: str, spec: Any, connection: Any) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent process ends it
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(1)
    with Path(os.devnull).open('w') as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
        row = check_network(scope, spec)
    connection.send(row)


def _end_with_parent() -> None:
    """End this process when its parent has died, for example from SIGKILL."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
