"""Train networks by federated averaging on disjoint parts of the data; compare what they score and send."""

import argparse
import json
import sys
from contextlib import redirect_stdout
from functools import partial
from pathlib import Path

from csg_seg.cli import one_line_errors

with one_line_errors():
    from mmengine.config import DictAction
    from rich.console import Console
    from rich.progress import track
    from rich.table import Table

    from csg_seg.cli import check_out
    from csg_seg.errors import CSGError
    from csg_seg.mm.checkpoint import forbid_unpickling
    from csg_seg.mm.compare import made_with
    from csg_seg.mm.federated import draw_federated, federate
    from csg_seg.mm.launch import check_data, check_starts, read_config
    from csg_seg.mm.results import add_result_options, check_result_options, write_result


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        '--network',
        nargs=4,
        action='append',
        required=True,
        metavar=('NAME', 'CONFIG', 'CHECKPOINT', 'TRAVELS'),
        help="what to train: CHECKPOINT is the start of all workers, TRAVELS a pattern such as '*' or '*.code' of what "
        'is trained and exchanged; may be given several times',
    )
    parser.add_argument('--workers', type=int, default=4, help='parts of the training data (default: 4)')
    parser.add_argument('--rounds', type=int, default=10, help='of averaging (default: 10)')
    parser.add_argument('--steps', type=int, default=10, help="of each worker's training in a round (default: 10)")
    parser.add_argument('--test-every', type=int, default=1, help='rounds between two tests (default: 1)')
    parser.add_argument('--metric', default='mIoU', help='score to gather (default: %(default)s)')
    parser.add_argument('--seed', type=int, default=0, help='of data order and augmentation (default: 0)')
    parser.add_argument('--work-dir', required=True, help='folder for logs')
    parser.add_argument('--picture', help='also draw score against rounds and bytes (.png)')
    parser.add_argument('--cfg-options', nargs='+', action=DictAction, help='override settings of all: key=value ...')
    add_result_options(parser)
    return parser.parse_args()


def read_configs(args: argparse.Namespace) -> dict:
    """Read the config of each network, and see that its data and its start are there."""
    configs = {}
    for name, config, checkpoint, _ in args.network:
        if name in configs or '/' in name:
            raise CSGError(f'--network {name}: give each network a name of its own, without a slash')
        options = {'randomness.seed': args.seed, 'work_dir': args.work_dir, 'experiment_name': name}
        options |= {**(args.cfg_options or {}), 'load_from': checkpoint}
        cfg = configs[name] = read_config(config, options)
        for split in ('train', 'test'):
            check_data(cfg, split)
        check_starts(cfg)
    return configs


def main() -> None:
    args = parse_args()
    forbid_unpickling()
    with one_line_errors():
        check_result_options(args)
        if args.picture:
            check_out(args.picture, overwrite=args.overwrite, option='--picture', endings=['.png'])
        configs = read_configs(args)
        networks = {}
        options = {key: getattr(args, key) for key in ('workers', 'rounds', 'steps', 'test_every', 'metric')}
        for name, _, checkpoint, travels in args.network:
            progress = partial(track, description=name, console=Console(stderr=True))
            out = Path(args.work_dir, f'{name}.pth')
            with redirect_stdout(sys.stderr):  # mmengine prints notes, stdout is for the result
                networks[name] = federate(configs[name], checkpoint, travels, out=out, **options, track=progress)
        result = write_result(args, {**options, 'networks': networks, 'made_with': made_with(seed=args.seed)})
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
