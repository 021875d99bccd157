"""Compare ways to train a generated network from a dense one, with equal numbers of training steps."""

import argparse
import json
import sys

from csg_seg.cli.errors import one_line_errors

with one_line_errors():
    from mmengine.config import DictAction
    from rich.console import Console
    from rich.table import Table

    from csg_seg.cli.results import add_result_options, check_result_options, write_result
    from csg_seg.mm.running.configs import read_config

    from .ways import WAYS, carry_over


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('config', help="dense config file, with the fine-tuning's schedule")
    parser.add_argument('checkpoint', help='its trained weights')
    parser.add_argument('--ratios', type=float, nargs='+', default=[2.3, 5.0], help='compression (default: 2.3 5)')
    parser.add_argument('--ways', nargs='+', help=f'choose from {", ".join(map(repr, WAYS))} (default: all that are possible)')
    parser.add_argument('--layers', nargs='+', default=['backbone.layer*.*'], help='layers whose outputs are compared (default: %(default)s)')
    parser.add_argument('--seeds', type=int, nargs='+', default=[0], help='(default: 0)')
    parser.add_argument('--work-dir', required=True, help='folder for the runs; finished runs are not repeated')
    parser.add_argument('--metric', default='accuracy/top1', help='score to report (default: %(default)s)')
    parser.add_argument('--jobs', type=int, default=1, help='number of runs at a time (default: 1)')
    parser.add_argument('--cfg-options', nargs='+', action=DictAction, help='override settings: key=value ...')
    add_result_options(parser)
    return parser.parse_args()


def print_table(result: dict) -> None:
    """Print a row for each ratio and way."""
    table = Table('compression', 'way', 'parameters stored', 'score', 'against dense')
    dense = result['dense']['score']
    table.add_row('1x', 'dense', f'{result["dense"]["stored_params"]:,}', f'{dense:.2f}', '')
    for ratio, found in result['ratios'].items():
        table.add_row(f'{ratio}x', 'fit only', '', f'{found["fitted"]["score"]:.2f}', '')
        for way, each in found['networks'].items():
            score, stored = each['mean'], f'{each["stored_params"]:,}'
            table.add_row(f'{ratio}x', way, stored, f'{score:.2f}', f'{score - dense:+.2f}')
    Console(width=None if sys.stdout.isatty() else 110).print(table)


def main() -> None:
    args = parse_args()
    with one_line_errors():
        check_result_options(args.out, overwrite=args.overwrite)
        cfg = read_config(args.config, args.cfg_options)
        options = dict(metric=args.metric, jobs=args.jobs)
        names = dict(layers=args.layers, seeds=args.seeds)
        figures = carry_over(cfg, args.checkpoint, args.ratios, args.ways, args.work_dir, **names, **options)
        result = write_result(args.out, figures)
    print(json.dumps(result)) if args.json else print_table(result)


if __name__ == '__main__':
    main()
