"""For the documents: what each rank holds and exchanges, and the time of a step over slow links."""

import re
import statistics
from collections.abc import Callable

from experiments.markdown import link, markdown, median, read

QUESTION = 'How many bytes do workers hold and exchange, and how long is a step over a slow link?'
VERDICT = 'faster where the link is slow; see [distributed](../docs/distributed.md)'


EXCHANGED = {'deeplabv3-r50': ('DeepLabV3-R50', 's16 d128'), 'resnet56': ('ResNet-56', 's12 d72')}


HELD = ('parameter_bytes', 'gradient_bytes', 'optimizer_bytes', 'all_reduced_bytes')


def exchange_summary() -> str:
    """Bytes of one rank, dense and CSG."""
    rows = []
    for name, (network, settings) in EXCHANGED.items():
        dense, csg = (each['all_reduced_bytes'] for each in read(f'exchange-{name}')['networks'].values())
        rows.append(
            (f'{network}, {settings}', f'{dense / 1e6:.2f} MB', f'{csg / 1e6:.2f} MB', f'{dense / csg:.2f} times')
        )
    first = 'one rank: parameters, gradients, optimizer state, and gradients all-reduced in a step, each'
    return markdown((first, 'dense', 'CSG', 'less'), rows)


def exchange_seconds() -> str:
    """Seconds of a step of DeepLabV3-R50 over each link."""
    links = read('exchange-deeplabv3-r50')['links']
    rows = [
        (f'link of {rate_name(rate)}', *(median(hooks['none']['seconds']) for hooks in networks.values()))
        for rate, networks in links.items()
        if rate != 'none'
    ]
    return markdown(('seconds of a training step of DeepLabV3-R50 on two CPU cores', 'dense', 'CSG'), rows)


def exchange_bytes() -> str:
    """Bytes of one rank, by kind, and the buckets."""
    rows = []
    for name, (network, settings) in EXCHANGED.items():
        for kind, each in zip(('dense', f'CSG {settings}'), read(f'exchange-{name}')['networks'].values(), strict=True):
            buckets = ' '.join(
                f'{one["bytes"] / 1e6:.1f}{chr(92) + "*" if one["generator"] else ""}' for one in each['buckets']
            )
            rows.append((f'{network}, {kind}', *(f'{each[key] / 1e6:.2f}' for key in HELD), buckets))
    columns = ('network', 'parameters', 'gradients', 'optimizer state', 'all-reduced in a step', 'buckets')
    return markdown(columns, rows, left=(0, 5))


def exchange_links(name: str) -> str:
    """Seconds of a step over each link, with each hook."""
    result = read(f'exchange-{name}')
    links = result['links']
    rows = []
    for kind, network in zip(('dense', 'CSG'), links['none'], strict=True):
        for hook in result['hooks']:
            cells = []
            for networks in links.values():
                seconds, first = networks[network][hook]['seconds'], next(iter(networks.values()))['none']['seconds']
                ratio = median(one / other for one, other in zip(seconds, first, strict=True))
                cells.append(f'{median(seconds)} ({ratio}x)')
            sent = statistics.median(links['none'][network][hook]['sent'])
            rows.append((kind, hook, f'{sent / 1e6:.1f}', *cells))
    return markdown(('network', 'hook', 'MB sent in a step', *map(rate_name, links)), rows, left=(0, 1))


def rate_name(rate: str) -> str:
    """Return '100 Mbit/s' for '100mbit'."""
    return (
        'no limit'
        if rate == 'none'
        else re.sub(r'(\d+)(.)bit', lambda found: f'{found[1]} {found[2].upper()}bit/s', rate)
    )


def result() -> str:
    """The result of ``experiments.exchange``."""
    result = read('exchange-deeplabv3-r50')
    dense, csg = (f'{each["all_reduced_bytes"] / 1e6:.2f}' for each in result['networks'].values())
    slow, fast = (median(hooks['none']['seconds']) for hooks in result['links']['100mbit'].values())
    return f'{link("exchange-deeplabv3-r50")}: {csg} MB for {dense}; at 100 Mbit/s {fast} s for {slow} s'


TABLES: dict[str, Callable[[], str]] = {
    'exchange-summary': exchange_summary,
    'exchange-seconds': exchange_seconds,
    'exchange-bytes': exchange_bytes,
    'exchange-links-deeplabv3-r50': lambda: exchange_links('deeplabv3-r50'),
    'exchange-links-resnet56': lambda: exchange_links('resnet56'),
}
