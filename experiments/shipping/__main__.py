"""Plan, train and ship networks from a trained dense one; score every stage and file on the test data."""

import argparse
from pathlib import Path

from csg_seg.cli.console import notes_to_stderr, print_result, print_table
from csg_seg.cli.failures import one_line_errors
from csg_seg.cli.options import add_cfg_options, add_checkpoint, add_config

with one_line_errors():
    from csg_seg.cli.results import add_result_options, check_result_options, made_with, write_result
    from csg_seg.running.configs import read_config

    from .stages import ship


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog='python -m experiments.shipping', description=__doc__)
    add_config(parser, "dense config file of a segmentation network, with the training's schedule")
    add_checkpoint(parser, 'its trained weights')
    parser.add_argument(
        '--ratios', type=float, nargs='+', default=[2.0, 4.0], help='compression; the first is trained (default: 2 4)'
    )
    parser.add_argument(
        '--layers',
        nargs='+',
        default=['backbone.layer*.*'],
        help='layers whose outputs the dense network teaches (default: %(default)s)',
    )
    parser.add_argument('--metric', default='mIoU', help='score to report (default: mIoU)')
    parser.add_argument('--work-dir', required=True, help='folder for runs and files; finished stages are not repeated')
    add_cfg_options(parser)
    add_result_options(parser)
    return parser.parse_args()


def print_stages(result: dict) -> None:
    """Print a line for each stage."""
    rows = []
    for each in result['stages']:
        size = f'{each["bytes"]:,}' if 'bytes' in each else ''
        rows.append((each['name'], f'{each["stored_params"]:,}', size, f'{each["score"]:.2f}'))
    print_table(('stage', 'parameters', 'bytes', result['metric']), rows)


def main() -> None:
    args = parse_args()
    with one_line_errors():
        check_result_options(args.out, overwrite=args.overwrite)
        cfg = read_config(args.config, args.cfg_options)
        options = dict(layers=args.layers, metric=args.metric)
        with notes_to_stderr():
            stages = ship(cfg, Path(args.checkpoint).resolve(), args.ratios, Path(args.work_dir), **options)
        figures = {'metric': args.metric, 'stages': stages, 'made_with': made_with(seed=0)}
        result = write_result(args.out, figures)
    print_result(result, print_stages, as_json=args.json)


if __name__ == '__main__':
    main()
