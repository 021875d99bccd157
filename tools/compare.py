"""Train a CSG config, its dense counterpart and perhaps a narrower network, and compare size, score and time."""

import argparse

from csg_seg.cli import console, options
from csg_seg.cli.failures import one_line_errors
from csg_seg.files import writing_into

with one_line_errors():
    from csg_seg.cli.results import made_with, write_result
    from csg_seg.running.comparison import compare
    from csg_seg.running.configs import read_config
    from csg_seg.running.preflight import check_data

NETWORKS = ('dense', 'csg', 'narrow')


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('dense', help='dense config file that trains for iterations, not epochs')
    parser.add_argument('csg', help='CSG config file')
    parser.add_argument('--narrow', help='config file of a narrower dense network, to train too')
    parser.add_argument('--work-dir', required=True, help='folder for checkpoints, picture and logs')
    parser.add_argument('--seed', type=int, default=0, help='seed of all trainings (default: 0)')
    options.add_cfg_options(parser, 'override settings of all configs: key=value ...')
    options.add_out(parser, 'also write the result to this JSON file', required=False)
    options.add_overwrite(parser)
    options.add_json(parser)
    return parser.parse_args()


def print_figures(result: dict) -> None:
    """Print a table of the networks, and the files that were written."""
    columns = ('network', 'parameters stored', 'compression', 'training checkpoint', 'steps', 'mIoU', 'step time')
    rows = []
    for name in [name for name in NETWORKS if name in result]:
        each, dense = result[name], result['dense']
        ratio = dense['stored_params'] / each['stored_params']
        relative = result['step_time_ratio'] if name == 'csg' else each['step_seconds'] / dense['step_seconds']
        size, seconds = f'{each["checkpoint_bytes"]:,} bytes', f'{1000 * each["step_seconds"]:.0f} ms'
        numbers = (f'{each["stored_params"]:,}', f'{ratio:.2f}x', size, f'{each["steps"]:,}', f'{each["mIoU"]:.2f}')
        rows.append((name, *numbers, f'{seconds} ({relative:.2f}x)'))
    console.print_table(columns, rows)
    for name, file in result['files'].items():
        print(f'{name}: {file["path"]} ({file["bytes"]:,} bytes)')


def main() -> None:
    args = parse_args()
    with one_line_errors():
        if args.out:
            options.check_out(args.out, overwrite=args.overwrite, inputs=[args.dense, args.csg, args.narrow])
        settings = {'randomness.seed': args.seed, **(args.cfg_options or {})}
        given = [path for path in (args.dense, args.csg, args.narrow) if path]
        configs = [read_config(path, settings) for path in given]
        for cfg in configs:
            for split in ('train', 'val', 'test'):
                check_data(cfg, split)
        with console.notes_to_stderr(), writing_into(args.work_dir):
            narrow = configs[2] if args.narrow else None
            figures = compare(*configs[:2], args.work_dir, narrow=narrow)
        figures['made_with'] = made_with(seed=figures.pop('seed'))
        result = write_result(args.out, figures)
    console.print_result(result, print_figures, as_json=args.json)


if __name__ == '__main__':
    main()
