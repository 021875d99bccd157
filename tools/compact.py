"""Write a trained CSG network into one small file, from which it can be built and used."""

import argparse
import json
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path

from csg_seg.cli import console, options
from csg_seg.cli.failures import one_line_errors

with one_line_errors():
    from csg_seg.deploy.compact_export import compact, logit_error
    from csg_seg.errors import CSGError
    from csg_seg.running.configs import read_config
    from csg_seg.running.preflight import check_data, check_score
    from csg_seg.storage.precision import DTYPES


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    options.add_config(parser, 'CSG config file')
    options.add_checkpoint(parser, 'its trained checkpoint')
    options.add_out(parser, 'file to write (.safetensors)')
    parser.add_argument('--dtype', choices=list(DTYPES), help="precision of the weights (default: float32, or BASE's)")
    parser.add_argument('--base', help='compact file to start from: write an update, which holds only what differs')
    parser.add_argument(
        '--images', type=int, default=0, help='compare class scores before and after, on this many test images'
    )
    parser.add_argument('--test', metavar='METRIC', help='test both, and compare this score, such as mIoU')
    options.add_cfg_options(parser)
    options.add_overwrite(parser)
    options.add_json(parser, 'print JSON')
    return parser.parse_args()


def measure_score(cfg, checkpoint: str, metric: str, base: str | None = None) -> float:
    """Test a checkpoint with tools/test.py, in its own process."""
    with tempfile.TemporaryDirectory() as folder:
        if base is not None:  # an update is read from where its base is
            Path(folder, Path(base).name).symlink_to(Path(base).resolve())
            update = Path(folder, f'update-of-{Path(base).name}')
            update.symlink_to(Path(checkpoint).resolve())
            checkpoint = str(update)
        config = Path(folder, 'config.py')
        config.write_text(cfg.pretty_text)
        tool = str(Path(__file__).with_name('test.py'))
        command = [sys.executable, tool, str(config), checkpoint, '--work-dir', folder, '--json']
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode != 0:
        raise CSGError(f'{checkpoint}: the test failed, see above')
    scores = json.loads(done.stdout)
    if metric not in scores:
        raise CSGError(f'there is no metric {metric!r}; the test gave {", ".join(scores)}')
    return scores[metric]


def print_lines(found: dict, out: str) -> None:
    """Print the size of the file and the differences that were measured."""
    sizes = f'{found["dense_bytes"]:,} bytes dense, {found["compact_bytes"]:,}'
    if 'base_bytes' in found:
        print(f'{out}: {sizes} as an update ({found["dtype"]}) of a base of {found["base_bytes"]:,}')
    else:
        print(f'{out}: {sizes} compact ({found["dtype"]}), {found["compression_ratio"]:.2f}x smaller')
    if 'logit_error' in found:
        error, size = found['logit_error'], found['logit_size']
        percent = 100 * error / size
        print(f'class scores differ by {error:.4f} on average, {percent:.2f} % of their mean size {size:.3f}')
    if 'score' in found:
        print(f'score {found["score"]:.2f} before, {found["compact_score"]:.2f} from the compact file')


def main() -> None:
    args = parse_args()
    with one_line_errors():
        inputs = [args.config, args.checkpoint, args.base]
        options.check_out(args.out, overwrite=args.overwrite, endings=['.safetensors'], inputs=inputs)
        cfg = read_config(args.config, args.cfg_options)
        if args.images < 0:
            raise CSGError(f'--images {args.images}: give a number of test images')
        if args.images or args.test:
            check_data(cfg, 'test')
        if args.test:
            check_score(cfg, 'test', args.test, given=f'--test {args.test}')
        scores = {'score': measure_score(cfg, args.checkpoint, args.test)} if args.test else {}
        found = compact(cfg, args.checkpoint, args.out, dtype=args.dtype, base=args.base) | scores
        if args.images:
            found |= logit_error(cfg, args.checkpoint, args.out, images=args.images, base=args.base)
        if args.test:
            found['compact_score'] = measure_score(cfg, args.out, args.test, args.base)
    console.print_result(found, partial(print_lines, out=args.out), as_json=args.json)


if __name__ == '__main__':
    main()
