"""Compare ways to train a generated network from a dense one, with equal numbers of training steps."""

import argparse

from csg_seg.cli.console import print_result, print_table
from csg_seg.cli.failures import one_line_errors
from csg_seg.cli.options import add_cfg_options, add_checkpoint, add_config

with one_line_errors():
    from csg_seg.cli.results import add_result_options, check_result_options, write_result
    from csg_seg.running.configs import read_config

    from .ways import WAYS, carry_over


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog='python -m experiments.carry_over', description=__doc__)
    add_config(parser, "dense config file, with the fine-tuning's schedule")
    add_checkpoint(parser, 'its trained weights')
    parser.add_argument('--ratios', type=float, nargs='+', default=[2.3, 5.0], help='compression (default: 2.3 5)')
    parser.add_argument('--ways', nargs='+', help=f'choose from {", ".join(map(repr, WAYS))} (default: all possible)')
    parser.add_argument(
        '--layers',
        nargs='+',
        default=['backbone.layer*.*'],
        help='layers whose outputs are compared (default: %(default)s)',
    )
    parser.add_argument('--seeds', type=int, nargs='+', default=[0], help='(default: 0)')
    parser.add_argument('--work-dir', required=True, help='folder for the runs; finished runs are not repeated')
    parser.add_argument('--metric', default='accuracy/top1', help='score to report (default: %(default)s)')
    parser.add_argument('--jobs', type=int, default=1, help='number of runs at a time (default: 1)')
    add_cfg_options(parser)
    add_result_options(parser)
    return parser.parse_args()


def print_scores(result: dict) -> None:
    """Print a row for each ratio and way."""
    columns = ('compression', 'way', 'parameters stored', 'score', 'difference to dense')
    dense = result['dense']['score']
    rows = [('1x', 'dense', f'{result["dense"]["stored_params"]:,}', f'{dense:.2f}', '')]
    for ratio, found in result['ratios'].items():
        rows.append((f'{ratio}x', 'fit only', '', f'{found["fitted"]["score"]:.2f}', ''))
        for way, each in found['networks'].items():
            score, stored = each['mean'], f'{each["stored_params"]:,}'
            rows.append((f'{ratio}x', way, stored, f'{score:.2f}', f'{score - dense:+.2f}'))
    print_table(columns, rows, left=2)


def main() -> None:
    args = parse_args()
    with one_line_errors():
        check_result_options(args.out, overwrite=args.overwrite)
        cfg = read_config(args.config, args.cfg_options)
        options = dict(metric=args.metric, jobs=args.jobs)
        names = dict(layers=args.layers, seeds=args.seeds)
        figures = carry_over(cfg, args.checkpoint, args.ratios, args.ways, args.work_dir, **names, **options)
        result = write_result(args.out, figures)
    print_result(result, print_scores, as_json=args.json)


if __name__ == '__main__':
    main()
