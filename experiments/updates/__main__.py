"""Write the networks of a table that were trained from one base as updates of it; measure bytes and scores."""

import argparse
import tempfile
from pathlib import Path

from csg_seg.cli.console import notes_to_stderr, print_result, print_table
from csg_seg.cli.failures import one_line_errors

with one_line_errors():
    from csg_seg.cli.results import add_result_options, check_result_options, made_with, write_result
    from csg_seg.storage.precision import DTYPES
    from experiments.runs.places import add_places
    from experiments.runs.table import read_table

    from .files import measure_updates, trained_family


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog='python -m experiments.updates', description=__doc__)
    parser.add_argument('table', help='table of trainings, such as experiments/runs/tables/camvid_dusk.yml')
    parser.add_argument('--base', default='csg-10x-s0', help='label of the cell of the base (default: csg-10x-s0)')
    parser.add_argument(
        '--dtypes',
        nargs='+',
        choices=list(DTYPES),
        default=['float32', 'int8'],
        help='precisions of the base (default: float32 int8)',
    )
    add_places(parser)
    add_result_options(parser)
    return parser.parse_args()


def print_rows(result: dict) -> None:
    """Print a line for each file."""
    columns = ('network', 'precision', 'bytes', 'to dense', 'val', 'test')
    rows = []
    for each in result['files']:
        ratio = f'{each["dense_bytes"] / each["bytes"]:.1f}x'
        scores = [f'{each[split]:.2f}' if split in each else '' for split in ('val', 'test')]
        rows.append((each['cell'], each['dtype'], f'{each["bytes"]:,}', ratio, *scores))
    print_table(columns, rows, width=110)


def main() -> None:
    args = parse_args()
    with one_line_errors():
        check_result_options(args.out, overwrite=args.overwrite)
        table = read_table(args.table)
        base, variants = trained_family(table, args.base, data=args.data, work_dir=args.work_dir)
        with notes_to_stderr(), tempfile.TemporaryDirectory() as folder:
            files = measure_updates(base, variants, args.dtypes, Path(folder))
        figures = {'table': args.table, 'metric': table.metric, 'files': files, 'made_with': made_with(seed=0)}
        result = write_result(args.out, figures)
    print_result(result, print_rows, as_json=args.json)


if __name__ == '__main__':
    main()
