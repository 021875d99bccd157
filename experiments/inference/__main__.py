"""Measure time to the first image and memory of a network: dense, from a compact file, and from ONNX files."""

import argparse
import tempfile
from pathlib import Path

from csg_seg.cli import options
from csg_seg.cli.console import notes_to_stderr, print_result, print_table, progress_bar
from csg_seg.cli.failures import one_line_errors

with one_line_errors():
    import torch

    from csg_seg.cli.results import add_result_options, check_result_options, made_with, write_result
    from csg_seg.errors import CSGError
    from csg_seg.running.configs import read_config

    from .ways import measure_inference


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog='python -m experiments.inference', description=__doc__)
    options.add_config(parser, 'CSG config file')
    parser.add_argument('--size', type=int, nargs=2, default=[512, 512], help='height and width (default: 512 512)')
    parser.add_argument('--rounds', type=int, default=3, help='processes for each way (default: 3)')
    add_result_options(parser)
    return parser.parse_args()


def print_ways(result: dict) -> None:
    """Print a line for each way."""
    columns = ('way', 'MB of file', 'load, s', 'first image, s', 'next image, s', 'peak memory, MB')
    rows = []
    for name, each in result['ways'].items():
        seconds = [f'{each[key]:.2f}' for key in ('load', 'first_image', 'next_image')]
        rows.append((name, f'{each["file_bytes"] / 1e6:.1f}', *seconds, f'{each["peak_bytes"] / 1e6:.0f}'))
    print_table(columns, rows, width=110)


def main() -> None:
    args = parse_args()
    with one_line_errors():
        check_result_options(args.out, overwrite=args.overwrite)
        if args.rounds < 1 or min(args.size) < 1:
            raise CSGError('--rounds and --size must be at least 1')
        cfg = read_config(args.config)
        threads = torch.get_num_threads()
        with notes_to_stderr(), tempfile.TemporaryDirectory() as folder:
            progress = progress_bar('Measuring')
            found = measure_inference(cfg, args.size, Path(folder), rounds=args.rounds, threads=threads, track=progress)
        figures = {'size': args.size, 'rounds': args.rounds, **found, 'made_with': made_with(seed=0)}
        result = write_result(args.out, figures)
    print_result(result, print_ways, as_json=args.json)


if __name__ == '__main__':
    main()
