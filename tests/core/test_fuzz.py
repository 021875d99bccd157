"""Compact files of unknown origin: thousands of damaged and forged files are each refused in one line."""

import copy
import json
import random
import resource
import struct
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load, save
from torch import nn

import csg_seg
from csg_seg.errors import CSGError
from csg_seg.generators.settings import Settings
from csg_seg.storage.builders import BUILDERS
from csg_seg.storage.format import digest

KINDS = {
    'linear': dict(slice_shape=(8, 12, 3, 3), code_dim=6),
    'binary': dict(slice_shape=(8, 12, 3, 3), code_dim=6, generator='binary'),
}
SIZES = {'truncation': 300, 'flip': 500, 'layout': 500, 'forgery': 900}
# Values to put into a header: of each type, small and large.
ODD = [
    None,
    True,
    -1,
    0,
    1,
    3.5,
    10**6,
    2**63,
    10**30,
    '',
    'x',
    'builtins.eval',
    [],
    {},
    [0],
    [[]],
    {'x': 1},
    [10**6] * 4,
]


class Net(nn.Sequential):
    def __init__(self, width=24):
        super().__init__(nn.Conv2d(3, width, 3), nn.BatchNorm2d(width), nn.Conv2d(width, 17, 3))


def write(kind):
    """Return the bytes of an intact file."""
    torch.manual_seed(0)
    model = csg_seg.retrofit(Net(), KINDS[kind])
    path = Path(f'intact-{kind}.safetensors')
    csg_seg.save_compact(model, path, dtype='int8', source=dict(builder='fuzz', width=24))
    return path.read_bytes()


def truncated(content, rng):
    return content[: rng.randrange(len(content))]


def flipped(content, rng):
    changed = bytearray(content)
    for _ in range(rng.choice([1, 1, 1, 2, 8])):
        changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    return bytes(changed) if changed != bytearray(content) else content[:-1]


def parts(content):
    size = struct.unpack('<Q', content[:8])[0]
    return json.loads(content[8 : 8 + size]), content[8 + size :]


def change(value, rng):
    """Replace something somewhere in a JSON value."""
    if isinstance(value, (list, dict)) and value and rng.random() < 0.8:
        changed = copy.deepcopy(value)
        key = rng.choice(list(changed)) if isinstance(value, dict) else rng.randrange(len(value))
        if rng.random() < 0.15:
            del changed[key]
        else:
            changed[key] = change(changed[key], rng)
        return changed
    return rng.choice([each for each in ODD if each != value])


def other_layout(content, rng):
    """Change shapes, types or offsets of tensors in the header."""
    header, data = parts(content)
    names = [name for name in header if name != '__metadata__']
    name = rng.choice(names)
    if rng.random() < 0.2:
        header[name]['dtype'] = rng.choice(['F64', 'I64', 'BOOL', 'U8', 'F8_E4M3', 'X'])
    else:
        header[name] = change(header[name], rng)
    text = json.dumps(header).encode()
    return struct.pack('<Q', rng.choice([len(text)] * 8 + [0, len(text) + 1, 2**40, 2**63])) + text + data


def forged(content, rng):
    """Change the description of the network, with a correct checksum."""
    header, _ = parts(content)
    metadata, tensors = header['__metadata__'], load(content)
    key = rng.choice(['generators', 'layers', 'source'])
    told = json.loads(metadata[key])
    changed = change(told, rng)
    metadata[key] = json.dumps(changed) if rng.random() < 0.95 else rng.choice(['', '[' * 10**5, 'NaN', '\0'])
    if rng.random() < 0.2:
        name = rng.choice(list(tensors))
        tensors[name] = rng.choice(
            [tensors[name].double(), tensors[name].flatten()[:1].clone(), torch.zeros(0), tensors[name].int()]
        )
    del metadata['sha256']
    metadata['sha256'] = digest(tensors, metadata)
    return save(tensors, metadata=metadata)


MAKERS = {'truncation': truncated, 'flip': flipped, 'layout': other_layout, 'forgery': forged}
# Some changes have no effect: keys that only retrofit reads, and omitted defaults.
HARMLESS = dict(include=None, exclude=(), seed=0, freeze_generator=False)


def harmless(content, changed):
    """Whether two files with correct checksums are the same for loading."""
    try:
        one, two = (parts(each)[0]['__metadata__'] for each in (content, changed))
        first, second = (Settings.from_dict(json.loads(each['generators'])[0]) for each in (one, two))
    except (CSGError, KeyError, ValueError, TypeError, IndexError):
        return False
    same = all(one[key] == two[key] for key in ('layers', 'source'))
    return same and replace(first, **HARMLESS) == replace(second, **HARMLESS)


def run():
    """Try all files in this process; print those that were not refused as they should be."""
    BUILDERS['fuzz'] = lambda *, width: Net(width)
    rng = random.Random(0)
    _, most = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path('/proc/self/statm').read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + 2**30, most))
    wrong, refused, path = [], 0, Path('broken.safetensors')
    for kind in KINDS:
        intact = write(kind)
        for maker, count in SIZES.items():
            for case in range(count // len(KINDS)):
                content = MAKERS[maker](intact, rng)
                path.write_bytes(content)
                try:
                    csg_seg.load_compact(path)
                except CSGError as error:
                    refused += 1
                    if '\n' in str(error) or not str(error).startswith(str(path)) or len(str(error)) > 500:
                        wrong.append(f'{kind} {maker} {case}: message {str(error)[:300]!r}')
                except BaseException as error:
                    wrong.append(f'{kind} {maker} {case}: {type(error).__name__} {str(error)[:200]}')
                else:
                    if not harmless(intact, content):
                        wrong.append(f'{kind} {maker} {case}: accepted {parts(content)[0]["__metadata__"]}')
    print(json.dumps({'refused': refused, 'wrong': wrong}))


@pytest.mark.skipif(not sys.platform.startswith('linux'), reason='needs /proc to limit memory')
def test_two_thousand_broken_files_are_refused_within_a_gigabyte(tmp_path):
    command = [sys.executable, __file__]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found['wrong'] == []
    assert found['refused'] > 2000


if __name__ == '__main__':
    run()
