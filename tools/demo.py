"""Segment or classify an image: draw the classes on it, and print their shares or scores."""

import argparse

from csg_seg.cli import console, options
from csg_seg.cli.failures import one_line_errors

with one_line_errors():
    from csg_seg.deploy.inference import draw, load_network, name_classes, predict, save_picture
    from csg_seg.errors import CSGError


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('image', help='JPEG or PNG file')
    options.add_network_options(parser)
    parser.add_argument('--out', default='demo.png', help='picture to write (default: demo.png)')
    parser.add_argument('--opacity', type=float, default=0.5, help='opacity of the colours, up to 1 (default: 0.5)')
    parser.add_argument('--scale', type=int, default=1, help='enlarge the picture, to read the names (default: 1)')
    parser.add_argument(
        '--low-memory', action='store_true', help='save memory: generate each weight when its layer computes'
    )
    options.add_overwrite(parser)
    options.add_json(parser, 'print JSON')
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    with one_line_errors():
        read = [args.image, args.config, args.checkpoint]
        options.check_out(args.out, overwrite=args.overwrite, endings=['.png', '.jpg'], inputs=read)
        if not 0 < args.opacity <= 1:
            raise CSGError(f'--opacity must be above 0 and at most 1; got {args.opacity}')
        if args.scale < 1:
            raise CSGError(f'--scale {args.scale}: give a whole number of at least 1')
        network = load_network(
            args.config, args.checkpoint, args.cfg_options, keep_weights=False if args.low_memory else None
        )
        prediction = predict(network, args.image)
        picture = draw(network, args.image, prediction, opacity=args.opacity, scale=args.scale)
        save_picture(picture, args.out)

    def print_lines(found: dict) -> None:
        for name, percent in found.items():
            print(f'{percent:6.2f} %  {name}')
        print(f'drawn: {args.out}')

    console.print_result(name_classes(network, prediction), print_lines, as_json=args.json)


if __name__ == '__main__':
    main()
