"""A network link of a given speed between two processes of one machine: Linux namespaces and a token bucket."""

import ctypes
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from csg_seg.errors import CSGError

NAMESPACES = Path('/run/netns')
CLONE_NEWNET = 0x40000000
UNITS = {'kbit': 1e3, 'mbit': 1e6, 'gbit': 1e9}
SLOWEST, FASTEST = 1e4, 1e11


@dataclass(frozen=True)
class End:
    """One end of a link: its network namespace, interface and address."""

    namespace: str
    interface: str
    address: str

    def enter(self) -> None:
        """Move this process into the namespace; sockets that are already open stay outside."""
        with (NAMESPACES / self.namespace).open() as file:
            # os.setns needs Python 3.12.
            if ctypes.CDLL(None, use_errno=True).setns(file.fileno(), CLONE_NEWNET):
                raise OSError(ctypes.get_errno(), f'cannot enter the network namespace {self.namespace}')

    def sent(self) -> int:
        """Return the number of bytes sent from this end, headers included."""
        fields = re.search(rf'^\s*{self.interface}:(.*)$', Path('/proc/thread-self/net/dev').read_text(), re.MULTILINE)
        assert fields is not None
        return int(fields[1].split()[8])


def parse_rate(rate: str) -> float:
    """Return the bits per second of a rate such as '100mbit' or '1gbit'.

    Raises:
        CSGError: it is not a rate, or out of range.
    """
    found = re.fullmatch(r'(\d+(?:\.\d+)?)(kbit|mbit|gbit)', rate)
    bits = float(found[1]) * UNITS[found[2]] if found else 0.0
    if not SLOWEST <= bits <= FASTEST:
        raise CSGError(f'{rate!r} is not a rate; give one from 10kbit to 100gbit, such as 100mbit or 1gbit')
    return bits


def _check_machine() -> None:
    """Check that this machine can create a link.

    Raises:
        CSGError: a program or the rights are missing.
    """
    lacking = [program for program in ('ip', 'tc') if shutil.which(program) is None]
    if lacking:
        raise CSGError(f"links need Linux with iproute2, but '{lacking[0]}' is not installed; leave --links out")
    if os.geteuid() != 0:
        raise CSGError('links are network namespaces, which need root; run as root, or leave --links out')


@contextmanager
def link() -> Iterator[tuple[End, End]]:
    """Create two linked network namespaces, and remove them at the end.

    Raises:
        CSGError: the machine does not allow it.
    """
    _check_machine()
    _sweep()
    tag = f'csg{os.getpid()}-'
    ends = End(f'{tag}a', 'linka', '10.91.0.1'), End(f'{tag}b', 'linkb', '10.91.0.2')
    # Remove them on SIGTERM too.
    before = signal.signal(signal.SIGTERM, _end)
    try:
        for end in ends:
            _run('ip', 'netns', 'add', end.namespace)
        one, two = ends
        pair = ('type', 'veth', 'peer', 'name', two.interface, 'netns', two.namespace)
        _run('ip', 'link', 'add', one.interface, 'netns', one.namespace, *pair)
        for end in ends:
            inside = ('ip', '-n', end.namespace)
            _run(*inside, 'address', 'add', f'{end.address}/24', 'dev', end.interface)
            _run(*inside, 'link', 'set', end.interface, 'up')
            _run(*inside, 'link', 'set', 'lo', 'up')
        yield ends
    finally:
        for end in ends:
            if (NAMESPACES / end.namespace).exists():
                _run('ip', 'netns', 'delete', end.namespace)
        signal.signal(signal.SIGTERM, before)


def _end(number: int, frame: Any) -> None:
    sys.exit(128 + number)


def _sweep() -> None:
    """Remove namespaces of processes that were killed."""
    for path in NAMESPACES.glob('csg*-?'):
        process = re.fullmatch(r'csg(\d+)-[ab]', path.name)
        if process and not Path('/proc', process[1]).exists():
            _run('ip', 'netns', 'delete', path.name)


def limit(ends: Sequence[End], rate: str) -> None:
    """Limit both directions of a link to a rate such as '100mbit'.

    The queue is long enough to drop nothing, so TCP's recovery does not affect the measurement.
    """
    # Bytes that pass at once after a pause: 1 ms of the rate, but at least a few packets.
    burst = max(round(parse_rate(rate) / 8 / 1000), 8 * 1024)
    for end in ends:
        shape = ('tbf', 'rate', rate, 'burst', f'{burst}b', 'latency', '1s')
        _run('tc', '-n', end.namespace, 'qdisc', 'replace', 'dev', end.interface, 'root', *shape)


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        said = ' '.join(done.stderr.split()) or f'exit status {done.returncode}'
        raise CSGError(f"cannot create a link on this machine: '{' '.join(command)}' failed: {said}; leave --links out")
