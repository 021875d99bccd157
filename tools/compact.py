"""Make one small file of a trained CSG network, enough by itself to build and use it."""

import argparse
import json
import tempfile
from pathlib import Path

from csg_seg.cli.errors import one_line_errors
from csg_seg.cli.options import check_out

with one_line_errors():
    from mmengine.config import DictAction

    from csg_seg.errors import CSGError
    from csg_seg.mm.deploy.compact_export import compact, logit_error
    from csg_seg.mm.running.configs import read_config
    from csg_seg.mm.running.preflight import check_data
    from csg_seg.storage.precision import DTYPES
    from experiments.runs.runner import evaluate


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('config', help='CSG config file')
    parser.add_argument('checkpoint', help='of its training')
    parser.add_argument('--out', required=True, help='file to write (.safetensors)')
    parser.add_argument('--dtype', choices=list(DTYPES), default='float32', help='of matrices (default: float32)')
    parser.add_argument(
        '--images', type=int, default=0, help="compare class scores on so many of the config's test images"
    )
    parser.add_argument('--test', metavar='METRIC', help='also test both, and compare this score, such as mIoU')
    parser.add_argument('--cfg-options', nargs='+', action=DictAction, help='override settings: key=value ...')
    parser.add_argument('--overwrite', action='store_true', help='replace OUT when it exists')
    parser.add_argument('--json', action='store_true', help='print JSON')
    return parser.parse_args()


def measure(args: argparse.Namespace, cfg) -> dict:
    """Say what the file costs in class scores and in the metric, as far as that was asked for."""
    found = {}
    if args.images:
        found |= logit_error(cfg, args.checkpoint, args.out, images=args.images)
    if args.test:
        with tempfile.TemporaryDirectory() as folder:
            options = dict(metric=args.test)
            for name, path in (('score', args.checkpoint), ('compact_score', args.out)):
                found[name] = evaluate(cfg, str(Path(path).resolve()), Path(folder, name), **options)['score']
    return found


def print_lines(found: dict, out: str) -> None:
    """Print what was measured."""
    sizes = f'{found["dense_bytes"]:,} bytes dense, {found["compact_bytes"]:,} compact'
    print(f'{out}: {sizes} ({found["dtype"]}), {found["compression_ratio"]:.2f}x smaller')
    if 'logit_error' in found:
        error, size = found['logit_error'], found['logit_size']
        print(
            f'class scores differ by {error:.4f} on average, {100 * error / size:.2f} % of their mean size {size:.3f}'
        )
    if 'score' in found:
        print(f'score {found["score"]:.2f} before, {found["compact_score"]:.2f} from the compact file')


def main() -> None:
    args = parse_args()
    with one_line_errors():
        inputs = [args.config, args.checkpoint]
        check_out(args.out, overwrite=args.overwrite, endings=['.safetensors'], inputs=inputs)
        cfg = read_config(args.config, args.cfg_options)
        if args.images < 0:
            raise CSGError(f'--images {args.images}: give a number of test images')
        if args.images or args.test:
            check_data(cfg, 'test')
        found = compact(cfg, args.checkpoint, args.out, dtype=args.dtype)
        found |= measure(args, cfg)
    print(json.dumps(found)) if args.json else print_lines(found, args.out)


if __name__ == '__main__':
    main()
