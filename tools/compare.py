"""Train a CSG config and its dense twin, and print what each stores, scores and takes."""

import argparse
import json
import sys
from contextlib import redirect_stdout
from pathlib import Path

from csg_seg.cli.errors import one_line_errors
from csg_seg.cli.options import check_out
from csg_seg.files import write_whole, writing_into

with one_line_errors():
    from mmengine.config import DictAction
    from rich.console import Console
    from rich.table import Table

    from csg_seg.mm.running.comparison import compare
    from csg_seg.mm.running.configs import read_config
    from csg_seg.mm.running.preflight import check_data


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('dense', help='dense config file, iteration-based')
    parser.add_argument('csg', help='CSG config file')
    parser.add_argument('--work-dir', required=True, help='folder for checkpoints, picture and logs')
    parser.add_argument('--seed', type=int, default=0, help='of both trainings (default: 0)')
    parser.add_argument('--cfg-options', nargs='+', action=DictAction, help='override settings of both: key=value ...')
    parser.add_argument('--out', help='also write the result to this JSON file')
    parser.add_argument('--json', action='store_true', help='print JSON instead of a table')
    return parser.parse_args()


def print_table(result: dict) -> None:
    """Print the figures of both networks, and where the files lie."""
    table = Table()
    columns = ('network', 'parameters stored', 'compression', 'training checkpoint', 'mIoU', 'step time')
    for column in columns:
        table.add_column(column, justify='left' if column == 'network' else 'right')
    for name, ratio, relative in (('dense', 1.0, 1.0), ('csg', result['compression_ratio'], result['step_time_ratio'])):
        each = result[name]
        numbers = (
            f'{each["stored_params"]:,}',
            f'{ratio:.2f}x',
            f'{each["checkpoint_bytes"]:,} bytes',
            f'{each["mIoU"]:.2f}',
        )
        table.add_row(name, *numbers, f'{1000 * each["step_seconds"]:.0f} ms ({relative:.2f}x)')
    console = Console(width=None if sys.stdout.isatty() else 110)
    console.print(table)
    for name, file in result['files'].items():
        print(f'{name}: {file["path"]} ({file["bytes"]:,} bytes)')


def main() -> None:
    args = parse_args()
    with one_line_errors():
        if args.out:
            check_out(args.out, overwrite=True, inputs=[args.dense, args.csg])
        options = {'randomness.seed': args.seed, **(args.cfg_options or {})}
        configs = [read_config(path, options) for path in (args.dense, args.csg)]
        for cfg in configs:
            for split in ('train', 'val', 'test'):
                check_data(cfg, split)
        # mmengine prints notes, stdout is for the result.
        with redirect_stdout(sys.stderr), writing_into(args.work_dir):
            figures = compare(*configs, args.work_dir)
        result = {**figures, 'command': ' '.join(['python', *sys.argv])}
        if args.out:
            text = json.dumps(result, indent=2) + '\n'
            write_whole(Path(args.out), lambda partial: partial.write_text(text))
    if args.json:
        print(json.dumps(result))
    else:
        print_table(result)


if __name__ == '__main__':
    main()
