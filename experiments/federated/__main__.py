"""Train networks by federated averaging on disjoint parts of the data; compare what they score and send."""

import argparse
import json
import sys
from contextlib import redirect_stdout
from functools import partial
from pathlib import Path

from csg_seg.cli.errors import one_line_errors
from csg_seg.files import writing_into

with one_line_errors():
    from mmengine.config import DictAction
    from rich.console import Console
    from rich.progress import track
    from rich.table import Table

    from csg_seg.cli.results import add_result_options, check_result_options, made_with, write_result
    from csg_seg.mm.checkpoints.unpickling import forbid_unpickling

    from .averaging import draw_federated, federate, read_networks


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    four = dict(nargs=4, metavar=('NAME', 'CONFIG', 'CHECKPOINT', 'TRAVELS'))
    what = "CHECKPOINT is the start of all workers, TRAVELS a pattern such as '*' or '*.code' of what is trained"
    parser.add_argument('--network', **four, action='append', required=True, help=f'{what} and exchanged; repeatable')
    parser.add_argument('--workers', type=int, default=4, help='parts of the training data (default: 4)')
    parser.add_argument('--rounds', type=int, default=10, help='of averaging (default: 10)')
    parser.add_argument('--steps', type=int, default=10, help="of each worker's training in a round (default: 10)")
    parser.add_argument('--test-every', type=int, default=1, help='rounds between two tests (default: 1)')
    parser.add_argument('--metric', default='mIoU', help='score to gather (default: %(default)s)')
    parser.add_argument('--seed', type=int, default=0, help='of data order and augmentation (default: 0)')
    parser.add_argument('--work-dir', required=True, help='folder for logs, and for NAME.pth of each network')
    parser.add_argument('--cfg-options', nargs='+', action=DictAction, help='override settings of all: key=value ...')
    add_result_options(parser, picture='score against rounds and bytes')
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    forbid_unpickling()
    numbers = {key: getattr(args, key) for key in ('workers', 'rounds', 'steps', 'test_every')}
    networks = {}
    with one_line_errors():
        check_result_options(args.out, overwrite=args.overwrite, picture=args.picture)
        configs = read_networks(args, numbers)
        for name, _, checkpoint, travels in args.network:
            options = dict(out=Path(args.work_dir, f'{name}.pth'), metric=args.metric)
            options['track'] = partial(track, description=name, console=Console(stderr=True))
            # mmengine prints notes, stdout is for the result.
            with redirect_stdout(sys.stderr), writing_into(args.work_dir):
                networks[name] = federate(configs[name], checkpoint, travels, **numbers, **options)
        figures = {**numbers, 'metric': args.metric, 'networks': networks, 'made_with': made_with(seed=args.seed)}
        result = write_result(args.out, figures)
        if args.picture:
            draw_federated(networks, args.picture, metric=args.metric)
    print(json.dumps(result)) if args.json else print_table(result)


def print_table(result: dict) -> None:
    """Print a row for each network and test."""
    table = Table('network', 'travels', 'bytes of one exchange', 'round', 'MB in all', result['metric'])
    for name, each in result['networks'].items():
        for point in each['scores']:
            total, score = f'{point["bytes"] / 1e6:.1f}', f'{point["score"]:.2f}'
            table.add_row(name, each['travels'], f'{each["bytes"]:,}', str(point['round']), total, score)
    Console(width=None if sys.stdout.isatty() else 110).print(table)


if __name__ == '__main__':
    main()
