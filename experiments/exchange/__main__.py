"""Count the bytes that workers hold and exchange in a training step, dense and CSG; time steps over a slow link."""

import argparse
from dataclasses import asdict
from pathlib import Path

from csg_seg.cli.console import notes_to_stderr, print_result, print_table
from csg_seg.cli.failures import one_line_errors
from csg_seg.cli.options import add_cfg_options

with one_line_errors():
    from csg_seg.cli.results import add_result_options, check_result_options, made_with, write_result
    from csg_seg.errors import CSGError
    from csg_seg.running.configs import read_config

    from .workers import HOOKS, Measurement, measure_exchange, summarise_seconds


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog='python -m experiments.exchange', description=__doc__)
    parser.add_argument('configs', nargs='+', help='config files; the others are compared with the first')
    parser.add_argument('--processes', type=int, default=2, help='ranks, on gloo (default: 2)')
    parser.add_argument('--links', nargs='+', default=[], metavar='RATE', help='such as 100mbit 1gbit; needs root')
    parser.add_argument('--hooks', nargs='+', default=['none'], help=f'choose from {", ".join(HOOKS)} (default: none)')
    parser.add_argument('--rounds', type=int, default=3, help='steps of each network, hook and link (default: 3)')
    parser.add_argument('--batch-size', type=int, default=2, help='images per rank (default: 2)')
    parser.add_argument('--size', type=int, nargs=2, default=[64, 64], help='height and width (default: 64 64)')
    add_cfg_options(parser, 'override settings of all: key=value ...')
    add_result_options(parser)
    return parser.parse_args()


def print_tables(result: dict) -> None:
    """Print the bytes that a rank holds and exchanges, and the steps over each link."""
    names = ('parameters', 'gradients', 'optimizer state', 'all-reduced a step')
    columns = ('network', *(f'{name}, MB' for name in names), 'buckets, MB (* holds a generator)')
    rows = []
    for name, each in result['networks'].items():
        keys = ('parameter_bytes', 'gradient_bytes', 'optimizer_bytes', 'all_reduced_bytes')
        buckets = ' '.join(f'{one["bytes"] / 1e6:.1f}{"*" * one["generator"]}' for one in each['buckets'])
        rows.append((name, *(f'{each[key] / 1e6:.2f}' for key in keys), buckets))
    print_table(columns, rows, width=130)
    if result['links']:
        columns = ('link', 'network', 'hook', 'seconds per step', 'ratio to the first', 'MB sent per step')
        rows = []
        for rate, networks in result['links'].items():
            first = next(iter(next(iter(networks.values())).values()))
            for name, hooks in networks.items():
                for hook, each in hooks.items():
                    found = summarise_seconds(each['seconds'], first['seconds'])
                    numbers = (f'{found["seconds"]:.2f}', f'{found["ratio"]:.2f}x', f'{each["sent"][-1] / 1e6:.1f}')
                    rows.append((rate, name, hook, *numbers))
        print_table(columns, rows, left=3, width=130)


def main() -> None:
    args = parse_args()
    with one_line_errors():
        check_result_options(args.out, overwrite=args.overwrite)
        cfgs = {Path(path).stem: read_config(path, args.cfg_options) for path in args.configs}
        if len(cfgs) < len(args.configs):
            raise CSGError('two of the configs have one name; rename one')
        settings = {key: getattr(args, key) for key in ('processes', 'hooks', 'rounds', 'batch_size')}
        measurement = Measurement(**settings, rates=args.links, size=tuple(args.size))
        with notes_to_stderr():
            figures = measure_exchange(cfgs, measurement)
        result = write_result(args.out, {**asdict(measurement), **figures, 'made_with': made_with(seed=0)})
    print_result(result, print_tables, as_json=args.json)


if __name__ == '__main__':
    main()
