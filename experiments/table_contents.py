"""All tables of the documents by name; those of an experiment are in the file summary.py in its folder."""

from collections.abc import Callable

from csg_seg.cli.main import describe

from .carry_over import summary as carry_over
from .exchange import summary as exchange
from .federated import summary as federated
from .fits import summary as fits
from .inference import summary as inference
from .markdown import markdown, read
from .peers import summary as peers
from .rivals import summary as rivals
from .runs import summary as runs
from .scale import summary as scale
from .shipping import summary as shipping
from .smaller_and_faster import summary as smaller_and_faster
from .speed import summary as speed
from .updates import summary as updates
from .zoo import summary as zoo

EXPERIMENTS = {
    'runs': runs,
    'speed': speed,
    'exchange': exchange,
    'federated': federated,
    'inference': inference,
    'updates': updates,
    'scale': scale,
    'zoo': zoo,
    'fits': fits,
    'carry_over': carry_over,
    'shipping': shipping,
    'smaller_and_faster': smaller_and_faster,
    'peers': peers,
    'rivals': rivals,
}


def demo() -> str:
    """Dense and CSG in ``make demo``."""
    result = read('demo')
    columns = ('network', 'parameters stored', 'compression', 'training checkpoint', 'mIoU', 'step time')
    rows = []
    dense = result['dense']
    for name in ('dense', 'csg', 'narrow'):
        each = result[name]
        ratio = dense['stored_params'] / each['stored_params']
        seconds = result['step_time_ratio'] if name == 'csg' else each['step_seconds'] / dense['step_seconds']
        size = f'{each["checkpoint_bytes"]:,} bytes'
        numbers = (f'{each["stored_params"]:,}', f'{ratio:.2f}x', size, f'{each["mIoU"]:.2f}')
        rows.append((name, *numbers, f'{seconds:.2f}x'))
    return markdown(columns, rows)


def experiments() -> str:
    """Questions and results of all experiments."""
    rows = [(f'`{name}`', each.QUESTION, each.result(), each.VERDICT) for name, each in EXPERIMENTS.items()]
    return markdown(('experiment', 'question', 'result', 'verdict'), rows, left=range(4))


def commands() -> str:
    """What each command of ``csg-seg`` does."""
    rows = [
        (task if position == 0 else '', f'`{name}`', says)
        for task, names in describe().items()
        for position, (name, says) in enumerate(names.items())
    ]
    return markdown(('to', 'command', 'what it does'), rows, left=range(3))


TABLES: dict[str, Callable[[], str]] = {
    'demo': demo,
    'commands': commands,
    'experiments': experiments,
    **{name: table for each in EXPERIMENTS.values() for name, table in each.TABLES.items()},
}
