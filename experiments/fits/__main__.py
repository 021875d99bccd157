"""Compare ways to fit a generator to a trained classifier, by errors and by accuracy."""

import argparse
import json
import sys
from functools import partial
from pathlib import Path

from csg_seg.cli.errors import one_line_errors

with one_line_errors():
    from rich.console import Console
    from rich.progress import track
    from rich.table import Table

    from csg_seg.cli.results import add_result_options, check_result_options, made_with, write_result
    from csg_seg.errors import CSGError
    from csg_seg.mm.model import build_model
    from csg_seg.mm.running.configs import read_config
    from csg_seg.mm.running.preflight import check_optimizer

    from .comparison import check_ways, compare_fits, train_from_fits

SETTINGS = ['s12-d72', 's8-2.3x', 's8-5x']


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('config', help='dense config file')
    parser.add_argument('checkpoint', help='its trained weights')
    parser.add_argument(
        '--settings',
        nargs='+',
        default=SETTINGS,
        help='3x3 slices and code length, or compression, such as s12-d72 s8x16-2.3x (default: %(default)s)',
    )
    parser.add_argument('--images', type=int, default=300, help='of the train split, to calibrate on (default: 300)')
    parser.add_argument('--train', nargs='+', default=[], help='ways to train on from, where no slice overhangs')
    parser.add_argument('--layers', nargs='+', default=['backbone.layer*.*'], help='features (default: %(default)s)')
    parser.add_argument('--work-dir', help='folder for the trainings; finished ones are not repeated')
    add_result_options(parser)
    return parser.parse_args()


def print_table(result: dict) -> None:
    """Print a row for each setting and way."""
    table = Table('settings', 'way', 'weight error', 'output error', 'accuracy', 'BatchNorm renewed', 'trained')
    dense = result['dense']
    table.add_row('dense', '', '', '', f'{dense["accuracy"]:.2f}', f'{dense["accuracy_bn"]:.2f}', '')
    for text, found in result['settings'].items():
        table.add_section()
        for way, each in found['ways'].items():
            trained = f'{each["accuracy_trained"]:.2f}' if 'accuracy_trained' in each else ''
            errors = f'{each["weight_error"]:.3f}', f'{each["output_error"]:.3f}'
            table.add_row(text, way, *errors, f'{each["accuracy"]:.2f}', f'{each["accuracy_bn"]:.2f}', trained)
    Console(width=None if sys.stdout.isatty() else 120).print(table)


def main() -> None:
    args = parse_args()
    with one_line_errors():
        check_result_options(args.out, overwrite=args.overwrite)
        check_ways(args.train)
        if args.train and not args.work_dir:
            raise CSGError('--train needs a folder for its runs; give --work-dir')
        cfg = read_config(args.config)
        if args.train:
            check_optimizer(cfg, build_model(cfg))
        progress = partial(track, description='fits', console=Console(stderr=True), transient=True)
        options = dict(images=args.images, folder=args.work_dir, track=progress)
        figures = compare_fits(cfg, args.checkpoint, args.settings, **options)
        if args.train:
            where = dict(layers=args.layers, tools=Path(__file__).parents[1])
            train_from_fits(cfg, args.checkpoint, figures, args.train, args.work_dir, **where)
        result = write_result(args.out, {'images': args.images, **figures, 'made_with': made_with(seed=0)})
    print(json.dumps(result)) if args.json else print_table(result)


if __name__ == '__main__':
    main()
