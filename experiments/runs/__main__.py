"""Train and test configs with several seeds; print parameters and scores."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from csg_seg.cli.console import print_result, print_table
from csg_seg.cli.failures import one_line_errors
from csg_seg.cli.options import add_cfg_options

with one_line_errors():
    from mmengine.config import Config

    from csg_seg.cli.results import add_result_options, check_result_options, write_result
    from csg_seg.errors import CSGError
    from csg_seg.running.configs import read_config

    from .runner import train_and_test


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog='python -m experiments.runs', description=__doc__)
    parser.add_argument('configs', nargs='+', help='config files; the others are compared with the first')
    add_options(parser, seeds=[0, 1, 2])
    return parser.parse_args()


def add_options(parser: argparse.ArgumentParser, *, seeds: Sequence[int]) -> None:
    """Add the options of a comparison of configs, with default seeds."""
    default = f'(default: {" ".join(map(str, seeds))})'
    parser.add_argument('--seeds', type=int, nargs='+', default=seeds, help=default)
    parser.add_argument('--work-dir', required=True, help='folder for the runs; finished runs are not repeated')
    parser.add_argument('--metric', default='accuracy/top1', help='score to report (default: %(default)s)')
    parser.add_argument('--jobs', type=int, default=1, help='number of runs at a time (default: 1)')
    add_cfg_options(parser, 'override settings of all: key=value ...')
    add_result_options(parser)


def print_scores(result: dict) -> None:
    """Print a row for each network."""
    columns = ('network', 'parameters stored', 'compression', result['metric'], 'difference to the first')
    rows = []
    first = next(iter(result['networks'].values()))
    for name, each in result['networks'].items():
        spread = '' if each['std'] is None else f' +- {each["std"]:.2f}'
        difference = f'{each["mean"] - first["mean"]:+.2f}'
        ratio = f'{each["compression_ratio"]:.2f}x'
        rows.append((name, f'{each["stored_params"]:,}', ratio, f'{each["mean"]:.2f}{spread}', difference))
    print_table(columns, rows, width=130)


def compare(args: argparse.Namespace) -> None:
    """Train and test the configs of the arguments, and print the scores."""
    with one_line_errors():
        check_result_options(args.out, overwrite=args.overwrite)
        configs: dict[str, Config] = {}
        for path in args.configs:
            name = Path(path).stem
            if name in configs:
                raise CSGError(f'two configs are named {name}; rename one')
            configs[name] = read_config(path, args.cfg_options)
        options = dict(metric=args.metric, jobs=args.jobs)
        figures = train_and_test(configs, args.seeds, args.work_dir, **options)
        result = write_result(args.out, figures)
    print_result(result, print_scores, as_json=args.json)


def main() -> None:
    compare(parse_args())


if __name__ == '__main__':
    main()
