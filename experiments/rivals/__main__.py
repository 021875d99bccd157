"""Train ResNet-20 with each kind of generator at equal size; print parameters and scores."""

import argparse

from csg_seg.cli.console import print_result, print_table
from csg_seg.cli.failures import one_line_errors
from csg_seg.cli.options import add_cfg_options

from .compared import config_paths

with one_line_errors():
    from csg_seg.cli.results import add_result_options, check_result_options, write_result
    from csg_seg.running.configs import read_config
    from experiments.runs.runner import train_and_test


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog='python -m experiments.rivals', description=__doc__)
    parser.add_argument('--seeds', type=int, nargs='+', default=[0], help='(default: 0)')
    parser.add_argument('--work-dir', required=True, help='folder for the runs; finished runs are not repeated')
    parser.add_argument('--jobs', type=int, default=1, help='number of runs at a time (default: 1)')
    add_cfg_options(parser, 'override settings of all: key=value ...')
    add_result_options(parser)
    return parser.parse_args()


def print_scores(result: dict) -> None:
    """Print a row for each network."""
    columns = ('network', 'parameters stored', 'compression', result['metric'], 'difference to the first')
    rows = []
    first = next(iter(result['networks'].values()))
    for name, each in result['networks'].items():
        spread = '' if each['std'] is None else f'±{each["std"]:.2f}'
        difference = f'{each["mean"] - first["mean"]:+.2f}'
        ratio = f'{each["compression_ratio"]:.2f}x'
        rows.append((name, f'{each["stored_params"]:,}', ratio, f'{each["mean"]:.2f}{spread}', difference))
    print_table(columns, rows, width=130)


def main() -> None:
    args = parse_args()
    with one_line_errors():
        check_result_options(args.out, overwrite=args.overwrite)
        configs = {path.stem: read_config(path, args.cfg_options) for path in config_paths()}
        result = write_result(args.out, train_and_test(configs, args.seeds, args.work_dir, jobs=args.jobs))
    print_result(result, print_scores, as_json=args.json)


if __name__ == '__main__':
    main()
