"""Train and test the cells of a table that results/ does not have yet, and print the table.

A cell is a config with settings and a seed. Interrupted trainings are resumed by the same command.
"""

import argparse
import sys
import time
from collections.abc import Mapping
from pathlib import Path

from csg_seg.cli.console import print_result, print_table, stderr_console
from csg_seg.cli.failures import one_line_errors
from csg_seg.cli.options import add_json, check_out

with one_line_errors():
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn

    from .picture import draw_scores
    from .places import add_places
    from .rows import label_of, read_rows, score_text, summarise
    from .table import ROOT, read_table
    from .training import train_missing


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog='python -m experiments.runs', description=__doc__)
    parser.add_argument('table', help='table of trainings, such as experiments/runs/tables/camvid.yml')
    parser.add_argument('--only', nargs='+', default=['*'], help="cells to train, by name or pattern: dense-s0 'csg-*'")
    parser.add_argument('--jobs', type=int, default=1, help='cells to train at a time, one thread each (default: 1)')
    parser.add_argument(
        '--float32',
        action='store_true',
        help='train in float32 rather than bfloat16, on a CPU without bfloat16 instructions; the rows say so',
    )
    parser.add_argument('--dry-run', action='store_true', help='train nothing; print what is done and what is missing')
    add_places(parser)
    parser.add_argument('--results', default=ROOT / 'results', help='folder of the results (default: results)')
    parser.add_argument(
        '--picture',
        help='also draw scores over stored parameters (.png); without --only, cells of other tables with as many '
        'epochs are drawn too',
    )
    parser.add_argument('--overwrite', action='store_true', help='replace PICTURE when it exists')
    add_json(parser, 'print the rows as JSON instead of a table')
    return parser.parse_args()


class Display:
    """Bars of the running trainings, with the time left, on stderr; on a file, a line every ten minutes."""

    def __init__(self) -> None:
        columns = (
            TextColumn('{task.description}'),
            BarColumn(),
            TaskProgressColumn(),
            TextColumn('{task.fields[left]}'),
        )
        self.bars = Progress(*columns, console=stderr_console(), transient=True)
        self.tasks: dict[str, tuple] = {}
        self.told = time.monotonic()

    def __enter__(self) -> 'Display':
        if self.bars.console.is_terminal:
            self.bars.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.bars.stop()

    def tell(self, line: str) -> None:
        """Print a line above the bars."""
        self.bars.console.print(line, markup=False, highlight=False, soft_wrap=True)

    def update(self, progress: Mapping[str, float]) -> None:
        """Show the fraction of each running training that is done."""
        for label in [label for label in self.tasks if label not in progress]:
            self.bars.remove_task(self.tasks.pop(label)[0])
        lines = []
        for label, done in progress.items():
            if label not in self.tasks:
                self.tasks[label] = (self.bars.add_task(label, total=1.0, left=''), time.monotonic(), done)
            task, started, first = self.tasks[label]
            left = ''
            if done > first:
                minutes = (time.monotonic() - started) * (1 - done) / (done - first) / 60
                left = f'{minutes:.0f} min left'
            self.bars.update(task, completed=done, left=left)
            lines.append(f'{label} {done:.0%}{left and ", "}{left}')
        if not self.bars.console.is_terminal and time.monotonic() - self.told > 600:
            self.told = time.monotonic()
            self.tell('; '.join(lines))


def print_rows(rows: list[dict]) -> None:
    """Print a line for each cell: its size and its scores."""
    metric = rows[0]['metric'] if rows else 'score'
    columns = (
        'cell',
        'size',
        'parameters stored',
        'compression',
        'seeds',
        f'val {metric}',
        f'test {metric}',
    )
    lines = []
    for each in summarise(rows):
        scores = [score_text(each[split]) for split in ('val', 'test')]
        ratio = f'{each["dense_params"] / each["stored_params"]:.1f}x'
        lines.append((each['cell'], each['size'], f'{each["stored_params"]:,}', ratio, str(each['seeds']), *scores))
    print_table(columns, lines, width=130)


def main() -> None:
    args = parse_args()
    with one_line_errors():
        table = read_table(args.table)
        cells = table.matching(args.only)
        if args.picture:
            check_out(args.picture, overwrite=args.overwrite, option='--picture', endings=['.png'])
        file = Path(args.results, f'{table.dataset}.json')
        failed = []
        if not args.dry_run:
            if done := {cell.label for cell in cells} & {label_of(row) for row in read_rows(file)}:
                print(
                    f'{len(done)} of {len(cells)} cells have a row in {file}; to train them again, give another folder '
                    'as --results',
                    file=sys.stderr,
                )
            with Display() as display:
                failed = train_missing(
                    table,
                    cells,
                    results=Path(args.results),
                    data=args.data,
                    work_dir=args.work_dir,
                    jobs=args.jobs,
                    float32=args.float32,
                    notify=display.update,
                    tell=display.tell,
                )
        wanted = {cell.label for cell in cells}
        rows = [row for row in read_rows(file) if label_of(row) in wanted]
        if args.picture and rows:
            others = [row for row in read_rows(file) if row not in rows] if args.only == ['*'] else []
            alike = [row for row in others if row['epochs'] == rows[0]['epochs']]
            draw_scores([*rows, *alike], args.picture, network=rows[0]['network'], size=rows[0]['size'])
    print_result(rows, print_rows, as_json=args.json)
    if args.dry_run:
        missing = [cell.label for cell in cells if cell.label not in {label_of(row) for row in rows}]
        print(
            f'{len(rows)} of {len(cells)} cells have a row in {file}; missing: {" ".join(missing) or "none"}',
            file=sys.stderr,
        )
    if failed:
        raise SystemExit(f'error: {len(failed)} of {len(cells)} cells failed: {" ".join(failed)}')


if __name__ == '__main__':
    main()
