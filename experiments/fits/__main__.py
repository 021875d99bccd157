"""Compare ways to fit a generator to a trained classifier, by errors and by accuracy."""

import argparse

from csg_seg.cli.console import print_result, print_table, progress_bar
from csg_seg.cli.failures import one_line_errors
from csg_seg.cli.options import add_checkpoint, add_config

with one_line_errors():
    from csg_seg.cli.results import add_result_options, check_result_options, made_with, write_result
    from csg_seg.errors import CSGError
    from csg_seg.mm.model import build_model
    from csg_seg.running.configs import read_config
    from csg_seg.running.preflight import check_optimizer

    from .measure import check_ways, compare_fits, train_from_fits

SETTINGS = ['s12-d72', 's8-2.3x', 's8-5x']


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog='python -m experiments.fits', description=__doc__)
    add_config(parser, 'dense config file')
    add_checkpoint(parser, 'its trained weights')
    parser.add_argument(
        '--settings',
        nargs='+',
        default=SETTINGS,
        help='3x3 slices and code length, or compression, such as s12-d72 s8x16-2.3x (default: %(default)s)',
    )
    parser.add_argument('--images', type=int, default=300, help='calibration images of the train split (default: 300)')
    parser.add_argument('--train', nargs='+', default=[], help='ways to train from, where no slice overhangs')
    parser.add_argument(
        '--layers',
        nargs='+',
        default=['backbone.layer*.*'],
        help='layers whose outputs are compared (default: %(default)s)',
    )
    parser.add_argument('--work-dir', help='folder for the trainings; finished runs are not repeated')
    add_result_options(parser)
    return parser.parse_args()


def print_errors(result: dict) -> None:
    """Print a row for each setting and way."""
    columns = ('settings', 'way', 'weight error', 'output error', 'accuracy', 'BatchNorm recomputed', 'trained')
    dense = result['dense']
    rows = [('dense', '', '', '', f'{dense["accuracy"]:.2f}', f'{dense["accuracy_bn"]:.2f}', '')]
    for text, found in result['settings'].items():
        for way, each in found['ways'].items():
            trained = f'{each["accuracy_trained"]:.2f}' if 'accuracy_trained' in each else ''
            errors = f'{each["weight_error"]:.3f}', f'{each["output_error"]:.3f}'
            rows.append((text, way, *errors, f'{each["accuracy"]:.2f}', f'{each["accuracy_bn"]:.2f}', trained))
    print_table(columns, rows, left=2, width=120)


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
        progress = progress_bar('Fits', transient=True)
        options = dict(images=args.images, folder=args.work_dir, track=progress)
        figures = compare_fits(cfg, args.checkpoint, args.settings, **options)
        if args.train:
            train_from_fits(cfg, args.checkpoint, figures, args.train, args.work_dir, layers=args.layers)
        result = write_result(args.out, {'images': args.images, **figures, 'made_with': made_with(seed=0)})
    print_result(result, print_errors, as_json=args.json)


if __name__ == '__main__':
    main()
