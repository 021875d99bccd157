"""Export a trained network to ONNX, and compare it with torch on images."""

import argparse
from contextlib import nullcontext

from csg_seg import CSGError, materialise
from csg_seg.cli import console, options
from csg_seg.cli.failures import one_line_errors

with one_line_errors():
    from csg_seg.deploy.inference import inputs, load_network
    from csg_seg.deploy.onnx_export import DTYPES, export_onnx
    from csg_seg.layers.bank import find_bank


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    options.add_network_options(parser)
    options.add_out(parser, 'file to write (.onnx)')
    parser.add_argument(
        '--images', nargs='+', required=True, metavar='IMAGE', help='images to compare torch and ONNX on'
    )
    parser.add_argument('--labels', action='store_true', help='output classes instead of their scores')
    parser.add_argument(
        '--dtype', choices=list(DTYPES), default='float32', help='precision of the weights (default: float32)'
    )
    parser.add_argument('--generated', action='store_true', help='keep codes and generators, for a small file')
    options.add_overwrite(parser)
    options.add_json(parser, 'print JSON')
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    with one_line_errors():
        read = [args.config, args.checkpoint, *args.images]
        options.check_out(args.out, overwrite=args.overwrite, endings=['.onnx'], inputs=read)
        network = load_network(args.config, args.checkpoint, args.cfg_options)
        images = [inputs(network, [each]) for each in args.images]
        is_dense = find_bank(network) is None
        if args.generated and is_dense:
            raise CSGError('--generated: this network is dense, without codes and generators to keep; leave it out')
        if not (args.generated or is_dense):
            network = materialise(network)
        with nullcontext() if args.json else console.stderr_console().status('exporting and comparing'):
            found = export_onnx(network, args.out, images, dtype=args.dtype, labels=args.labels)

    def print_lines(found: dict) -> None:
        print(f'{args.out}: {found["bytes"]:,} bytes, {found["nodes"]} nodes, {found["dtype"]}')
        difference = f'{found["max_difference"]:.2g} (images: {len(images)})'
        print(f'class scores differ from those of torch by at most {difference}')

    console.print_result(found, print_lines, as_json=args.json)


if __name__ == '__main__':
    main()
