"""Retrofit every network of an installed library; check training, storing, loading and materialising."""

import argparse
import json
import signal
import sys
from contextlib import closing
from pathlib import Path

from csg_seg.cli.console import print_result, print_table, progress_bar
from csg_seg.cli.failures import one_line_errors
from csg_seg.cli.options import add_json, add_out, check_out
from csg_seg.files import writing

with one_line_errors():
    from .libraries import SCOPES, check_all, list_networks
    from .rows import read_rows, summarise_rows


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog='python -m experiments.zoo', description=__doc__)
    parser.add_argument('--scope', required=True, choices=SCOPES, help='library')
    parser.add_argument('--names', nargs='+', default=['*'], help="patterns of names (default: '*')")
    parser.add_argument('--jobs', type=int, default=1, help='networks at a time (default: 1)')
    parser.add_argument('--seconds', type=float, default=300, help='time limit of a network (default: 300)')
    add_out(parser, 'file for a JSON line of each network')
    parser.add_argument('--resume', action='store_true', help='skip the networks that are in OUT')
    add_json(parser, 'print the rows as JSON instead of a table')
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    with one_line_errors():
        out = Path(args.out)
        check_out(out, overwrite=args.resume, remedy='give --resume')
        networks = list_networks(args.scope, args.names)
        rows = read_rows(out, args.scope)
        done = {row['name'] for row in rows}
        waiting = {name: spec for name, spec in networks.items() if name not in done}
        out.parent.mkdir(parents=True, exist_ok=True)
        progress = progress_bar(args.scope)
        checks = check_all(args.scope, waiting, jobs=args.jobs, seconds=args.seconds, track=progress)
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that `closing` stops the checks
        with writing(out), out.open('a') as file, closing(checks):
            if rows and not out.read_text().endswith('\n'):
                file.write('\n')
            for row in checks:
                rows.append(row)
                file.write(json.dumps(row) + '\n')
                file.flush()
    print_result(rows, print_summary, as_json=args.json)
    sys.exit(any(row['result'] == 'fail' for row in rows))


def print_summary(rows: list) -> None:
    """Print the networks that did not pass, and a summary."""
    keys = ('name', 'result', 'reason', 'seconds')
    failed = [[str(row[key]) for key in keys] for row in rows if row['result'] != 'pass']
    if failed:
        print_table(('network', *keys[1:]), failed, left=3, width=130)
    summary = summarise_rows(rows)
    print(', '.join(f'{count} {result}' for result, count in summary['results'].items() if count))
    if summary['ratio']:
        least, median, most = summary['ratio']
        print(f'Of those that pass, {summary["on_losses"]} trained on losses, the others on outputs.')
        print(f'{summary["generated"]:,} convs generated; networks {least:.2f} to {most:.2f} times smaller,')
        left = '; '.join(f'{count:,} {reason}' for reason, count in summary['left_dense'].most_common())
        print(f'median {median:.2f}. Left dense: {left or "none"}')


if __name__ == '__main__':
    main()
