"""Time training steps, evaluations and loading of the networks of a table, by turns in one process."""

import argparse
from dataclasses import asdict

from csg_seg.cli.console import notes_to_stderr, print_result, print_table, progress_bar
from csg_seg.cli.failures import one_line_errors

with one_line_errors():
    import torch

    from csg_seg.cli.results import add_result_options, check_result_options, made_with, write_result
    from experiments.runs.table import read_table
    from experiments.speed.timing import Load, training_load

    from .measure import held_in_step, measure_peers


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog='python -m experiments.peers', description=__doc__)
    parser.add_argument('tables', nargs='+', help='tables of trainings; nothing is trained')
    parser.add_argument('--only', nargs='+', default=['*'], help="cells beside the dense one: 'csg-10x' '*-10x'")
    parser.add_argument('--batch-size', type=int, help="images in a training step (default: the config's)")
    parser.add_argument('--size', type=int, nargs=2, help="height and width (default: the config's crop)")
    parser.add_argument('--rounds', type=int, default=10, help='measured rounds (default: 10)')
    parser.add_argument('--warm-up', type=int, default=2, help='rounds before the measured ones (default: 2)')
    parser.add_argument('--bf16', action='store_true', help='autocast to bfloat16')
    parser.add_argument('--channels-last', action='store_true', help='use channels-last memory format')
    add_result_options(parser)
    return parser.parse_args()


def print_peers(result: dict) -> None:
    """Print a line for each network."""
    columns = ('network', 'parameters', 'GFLOPs', 'step', 'evaluation', 'MB in a step', 'MB of file', 'first image, s')
    rows = []
    for name, each in result['networks'].items():
        ratios = [f'{each[f"{key}_ratio"]:.2f}x' for key in ('step', 'evaluation')]
        numbers = (f'{each["stored_params"]:,}', f'{each["flops"] / 1e9:.2f}', *ratios)
        megabytes = [f'{count / 1e6:.1f}' for count in (held_in_step(each), each['file_bytes'])]
        rows.append((name, *numbers, *megabytes, f'{each["first_image"]:.2f}'))
    print_table(columns, rows, width=130)


def main() -> None:
    args = parse_args()
    with one_line_errors():
        check_result_options(args.out, overwrite=args.overwrite)
        tables = [read_table(path) for path in args.tables]
        chosen = [cell for table in tables for pattern in args.only for cell in table.find(pattern)]
        dense = tables[0].dense_of(chosen[0]) if chosen else tables[0].cells[0]
        cells = list({cell.name: cell for cell in [dense, *chosen] if cell.seed == dense.seed}.values())
        wanted = training_load(dense.read_config())
        wanted |= {key: value for key in ('batch_size', 'size') if (value := getattr(args, key)) is not None}
        options = {key: getattr(args, key) for key in ('rounds', 'warm_up', 'bf16', 'channels_last')}
        load = Load(**wanted, **options, device='cuda' if torch.cuda.is_available() else 'cpu')
        with notes_to_stderr():
            networks = measure_peers(cells, load, track=progress_bar('Timing'))
        figures = {'load': asdict(load), 'networks': networks, 'made_with': made_with(seed=dense.seed)}
        result = write_result(args.out, figures)
    print_result(result, print_peers, as_json=args.json)


if __name__ == '__main__':
    main()
