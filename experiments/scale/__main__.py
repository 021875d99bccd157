"""Measure what retrofitting, fitting, saving and loading cost, from small networks to large ones."""

import argparse
import json
import sys
from contextlib import redirect_stdout
from functools import partial
from pathlib import Path

from csg_seg.cli.errors import one_line_errors

with one_line_errors():
    from rich.console import Console
    from rich.progress import track
    from rich.table import Column, Table

    from csg_seg.cli.results import add_result_options, check_result_options, made_with, write_result
    from csg_seg.errors import CSGError
    from csg_seg.mm.running.configs import read_config

    from .costs import PHASES, draw_scale, measure_scale


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('configs', nargs='+', help='dense config files')
    add_result_options(parser, picture='seconds and memory against parameters')
    return parser.parse_args()


def print_table(result: dict) -> None:
    """Print a row for each network."""
    columns = [Column(f'{phase}, s', justify='right') for phase in PHASES]
    table = Table('network', 'parameters', 'stored', *columns, 'dense, MB', 'compact, MB', 'peak, MB')
    for name, each in result['networks'].items():
        counts = (f'{each[key] / 1e6:.2f} M' for key in ('params', 'stored_params'))
        seconds = (f'{each["seconds"][phase]:.2f}' for phase in PHASES)
        sizes = (f'{each[key] / 1e6:.1f}' for key in ('dense_bytes', 'compact_bytes', 'peak_bytes'))
        table.add_row(name, *counts, *seconds, *sizes)
    Console(width=None if sys.stdout.isatty() else 150).print(table)


def main() -> None:
    args = parse_args()
    with one_line_errors():
        check_result_options(args.out, overwrite=args.overwrite, picture=args.picture)
        cfgs = {Path(path).stem: read_config(path) for path in args.configs}
        if len(cfgs) < len(args.configs):
            raise CSGError('two of the configs have one name; give each its own')
        progress = partial(track, description='Networks', console=Console(stderr=True))
        with redirect_stdout(sys.stderr):  # mmengine prints notes, stdout is for the result
            networks = measure_scale(cfgs, track=progress)
        result = write_result(args.out, {'networks': networks, 'made_with': made_with(seed=0)})
        if args.picture:
            draw_scale(networks, args.picture)
    print(json.dumps(result)) if args.json else print_table(result)


if __name__ == '__main__':
    main()
