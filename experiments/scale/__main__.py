"""Measure time and memory of retrofitting, fitting, saving and loading, from small networks to large ones."""

import argparse
from pathlib import Path

from csg_seg.cli.console import notes_to_stderr, print_result, print_table, progress_bar
from csg_seg.cli.failures import one_line_errors

with one_line_errors():
    from csg_seg.cli.results import add_result_options, check_result_options, made_with, write_result
    from csg_seg.errors import CSGError
    from csg_seg.running.configs import read_config

    from .costs import PHASES, measure_scale
    from .picture import draw_scale


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog='python -m experiments.scale', description=__doc__)
    parser.add_argument('configs', nargs='+', help='dense config files')
    add_result_options(parser, picture='seconds and memory over parameters')
    return parser.parse_args()


def print_costs(result: dict) -> None:
    """Print a row for each network."""
    seconds = (f'{phase}, s' for phase in PHASES)
    columns = ('network', 'parameters', 'stored', *seconds, 'dense, MB', 'compact, MB', 'peak, MB')
    rows = []
    for name, each in result['networks'].items():
        counts = (f'{each[key] / 1e6:.2f} M' for key in ('params', 'stored_params'))
        seconds = (f'{each["seconds"][phase]:.2f}' for phase in PHASES)
        sizes = (f'{each[key] / 1e6:.1f}' for key in ('dense_bytes', 'compact_bytes', 'peak_bytes'))
        rows.append((name, *counts, *seconds, *sizes))
    print_table(columns, rows, width=150)


def main() -> None:
    args = parse_args()
    with one_line_errors():
        check_result_options(args.out, overwrite=args.overwrite, picture=args.picture)
        cfgs = {Path(path).stem: read_config(path) for path in args.configs}
        if len(cfgs) < len(args.configs):
            raise CSGError('two of the configs have one name; rename one')
        progress = progress_bar('Networks')
        with notes_to_stderr():
            networks = measure_scale(cfgs, track=progress)
        result = write_result(args.out, {'networks': networks, 'made_with': made_with(seed=0)})
        if args.picture:
            draw_scale(networks, args.picture)
    print_result(result, print_costs, as_json=args.json)


if __name__ == '__main__':
    main()
