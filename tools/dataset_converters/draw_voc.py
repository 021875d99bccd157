"""Draw a small data set in the layout of Pascal VOC 2012, to try the package without a download."""

import argparse
import inspect
from pathlib import Path

from csg_seg.cli import console, options
from csg_seg.cli.failures import one_line_errors

with one_line_errors():
    from csg_seg.data.drawn import draw_dataset


def parse_args() -> argparse.Namespace:
    defaults = {name: parameter.default for name, parameter in inspect.signature(draw_dataset).parameters.items()}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument('out', type=Path, help='folder to write VOC2012 into, such as data/drawn')
    for option, metavar, text in (
        ('train', 'N', 'images to train on'),
        ('val', 'N', 'images to evaluate on'),
        ('size', 'PX', 'side of the square images'),
        ('seed', 'S', 'other seeds, other images'),
    ):
        parser.add_argument(f'--{option}', type=int, default=defaults[option], metavar=metavar, help=text)
    options.add_json(parser, 'print the result as JSON alone')
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    settings = {name: getattr(args, name) for name in ('train', 'val', 'size', 'seed')}
    with one_line_errors():
        progress = None if args.json else console.progress_bar('Drawing')
        home = draw_dataset(args.out, **settings, progress=progress)
    text = f'{args.train} images to train on and {args.val} to evaluate on are in {home}'
    console.print_result({'data_root': str(home), **settings}, lambda _: print(text), as_json=args.json)


if __name__ == '__main__':
    main()
