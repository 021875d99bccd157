"""Train networks by federated averaging on disjoint parts of the data; compare their scores and bytes sent."""

import argparse
from pathlib import Path

from csg_seg.cli.console import notes_to_stderr, print_result, print_table, progress_bar
from csg_seg.cli.failures import one_line_errors
from csg_seg.cli.options import add_cfg_options
from csg_seg.files import writing_into

with one_line_errors():
    from csg_seg.cli.results import add_result_options, check_result_options, made_with, write_result
    from csg_seg.mm.checkpoints.unpickling import forbid_unpickling

    from .averaging import federate, read_networks
    from .picture import draw_federated


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog='python -m experiments.federated', description=__doc__)
    names = ('NAME', 'CONFIG', 'CHECKPOINT', 'TRAVELS')
    what = "CHECKPOINT is the start of all workers, TRAVELS a pattern such as '*' or '*.code' of the tensors to train"
    network = parser.add_argument('--network', nargs=4, metavar=names, action='append', required=True)
    network.help = f'{what} and exchange; repeatable'
    parser.add_argument('--workers', type=int, default=4, help='parts of the training data (default: 4)')
    parser.add_argument('--rounds', type=int, default=10, help='rounds of averaging (default: 10)')
    parser.add_argument('--steps', type=int, default=10, help='training steps of each worker in a round (default: 10)')
    parser.add_argument('--test-every', type=int, default=1, help='rounds between two tests (default: 1)')
    parser.add_argument('--metric', default='mIoU', help='score to report (default: %(default)s)')
    parser.add_argument('--seed', type=int, default=0, help='seed of data order and augmentation (default: 0)')
    parser.add_argument('--work-dir', required=True, help='folder for logs and NAME.pth of each network')
    add_cfg_options(parser, 'override settings of all: key=value ...')
    add_result_options(parser, picture='the score over rounds and bytes')
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    forbid_unpickling()
    numbers = {key: getattr(args, key) for key in ('workers', 'rounds', 'steps', 'test_every')}
    networks = {}
    with one_line_errors():
        check_result_options(args.out, overwrite=args.overwrite, picture=args.picture)
        shared = dict(seed=args.seed, cfg_options=args.cfg_options, overwrite=args.overwrite)
        configs = read_networks(args.network, args.work_dir, **shared, **numbers)
        for name, _, checkpoint, travels in args.network:
            options = dict(out=Path(args.work_dir, f'{name}.pth'), metric=args.metric)
            options['track'] = progress_bar(name)
            with notes_to_stderr(), writing_into(args.work_dir):
                networks[name] = federate(configs[name], checkpoint, travels, **numbers, **options)
        figures = {**numbers, 'metric': args.metric, 'networks': networks, 'made_with': made_with(seed=args.seed)}
        result = write_result(args.out, figures)
        if args.picture:
            draw_federated(networks, args.picture, metric=args.metric)
    print_result(result, print_scores, as_json=args.json)


def print_scores(result: dict) -> None:
    """Print a row for each network and test."""
    columns = ('network', 'travels', 'bytes of one exchange', 'round', 'MB in all', result['metric'])
    rows = []
    for name, each in result['networks'].items():
        for point in each['scores']:
            total, score = f'{point["bytes"] / 1e6:.1f}', f'{point["score"]:.2f}'
            rows.append((name, each['travels'], f'{each["bytes"]:,}', str(point['round']), total, score))
    print_table(columns, rows, left=2)


if __name__ == '__main__':
    main()
