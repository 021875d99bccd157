"""Measure the trained networks of a table as ONNX files, in float32 and in int8: bytes, operations, time and scores."""

import argparse
import tempfile
from pathlib import Path

from csg_seg.cli.console import notes_to_stderr, print_result, print_table, progress_bar
from csg_seg.cli.failures import one_line_errors

with one_line_errors():
    import onnxruntime

    from csg_seg.cli.results import add_result_options, check_result_options, made_with, write_result
    from experiments.runs.places import add_places
    from experiments.runs.table import read_table
    from experiments.runs.training import Run, processor

    from .measure import measure_networks


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog='python -m experiments.smaller_and_faster', description=__doc__)
    parser.add_argument('table', help='table of trainings, such as experiments/runs/tables/camvid_small.yml')
    parser.add_argument('--only', nargs='+', default=['*'], help="cells, by name or pattern: dense-s0 'csg-*'")
    parser.add_argument('--calibration', type=int, default=20, help='training images to calibrate on (default: 20)')
    parser.add_argument('--rounds', type=int, default=30, help='images that each file computes (default: 30)')
    add_places(parser)
    add_result_options(parser)
    return parser.parse_args()


def print_networks(result: dict) -> None:
    """Print two lines for each network: its ONNX file in float32 and in int8."""
    columns = ('network', 'shipped', 'GFLOPs', 'ONNX', 'bytes', 'ms', 'val', 'test')
    rows = []
    for name, each in result['networks'].items():
        for kind, onnx in each['onnx'].items():
            figures = [f'{onnx[key]:.2f}' for key in ('milliseconds', 'val', 'test')]
            size = (f'{each["shipped_bytes"]:,}', f'{each["flops"] / 1e9:.2f}', kind, f'{onnx["bytes"]:,}')
            rows.append((name, *size, *figures))
    print_table(columns, rows, width=110)


def main() -> None:
    args = parse_args()
    with one_line_errors():
        check_result_options(args.out, overwrite=args.overwrite)
        table = read_table(args.table)
        runs = [Run(table, cell, data=args.data, work_dir=args.work_dir) for cell in table.matching(args.only)]
        with notes_to_stderr(), tempfile.TemporaryDirectory() as folder:
            networks = measure_networks(
                runs,
                Path(folder),
                calibration=args.calibration,
                rounds=args.rounds,
                track=progress_bar('Measuring'),
            )
        made = {**made_with(seed=0), 'cpu': processor(), 'onnxruntime': onnxruntime.__version__}
        figures = {'table': args.table, 'metric': table.metric, 'calibration': args.calibration, 'rounds': args.rounds}
        result = write_result(args.out, {**figures, 'networks': networks, 'made_with': made})
    print_result(result, print_networks, as_json=args.json)


if __name__ == '__main__':
    main()
