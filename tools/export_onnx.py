"""Write a trained network as an ONNX file, and compare it with torch on images."""

import argparse
import json
from contextlib import nullcontext

from csg_seg import materialise
from csg_seg.cli.errors import one_line_errors
from csg_seg.cli.options import check_out

with one_line_errors():
    from rich.console import Console

    from csg_seg.layers.bank import find_bank
    from csg_seg.mm.deploy.inference import add_network_options, inputs, load_network
    from csg_seg.mm.deploy.onnx_export import DTYPES, export_onnx


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    add_network_options(parser)
    parser.add_argument('--out', required=True, help='file to write (.onnx)')
    parser.add_argument('--images', nargs='+', required=True, metavar='IMAGE', help='to compare with torch on')
    parser.add_argument('--labels', action='store_true', help='let it give classes, not their scores')
    parser.add_argument('--dtype', choices=list(DTYPES), default='float32', help='of weights (default: float32)')
    parser.add_argument('--generated', action='store_true', help='keep codes and generators, and make weights on use')
    parser.add_argument('--overwrite', action='store_true', help='replace OUT when it exists')
    parser.add_argument('--json', action='store_true', help='print JSON')
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    with one_line_errors():
        read = [args.config, args.checkpoint, *args.images]
        check_out(args.out, overwrite=args.overwrite, endings=['.onnx'], inputs=read)
        network = load_network(args.config, args.checkpoint, args.cfg_options)
        images = [inputs(network, [each]) for each in args.images]
        if not args.generated and find_bank(network) is not None:
            network = materialise(network)
        console = Console(stderr=True)
        with nullcontext() if args.json else console.status('exporting and comparing'):
            found = export_onnx(network, args.out, images, dtype=args.dtype, labels=args.labels)
    if args.json:
        print(json.dumps(found))
        return
    print(f'{args.out}: {found["bytes"]:,} bytes, {found["nodes"]} nodes, {found["dtype"]}')
    print(f'class scores differ from those of torch by at most {found["max_difference"]:.2g} (images: {len(images)})')


if __name__ == '__main__':
    main()
