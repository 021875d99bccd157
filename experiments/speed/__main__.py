"""Time training steps and evaluations of a network dense, generated and materialised, by turns, and what it holds."""

import argparse
import json
import sys
from contextlib import redirect_stdout
from dataclasses import asdict
from functools import partial
from pathlib import Path

from csg_seg.cli.errors import one_line_errors

with one_line_errors():
    import torch
    from mmengine.config import DictAction
    from rich.console import Console
    from rich.progress import track
    from rich.table import Table

    from csg_seg.cli.results import add_result_options, check_result_options, made_with, write_result
    from csg_seg.errors import CSGError
    from csg_seg.mm.running.configs import read_config

    from .timing import HELD, Load, draw_speed, measure_speed, summarise_speed, training_load


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('config', help='CSG config file')
    parser.add_argument('--batch-size', type=int, help="images of a training step (default: the config's)")
    parser.add_argument('--size', type=int, nargs=2, help="height and width (default: the config's crop)")
    parser.add_argument('--eval-batch-size', type=int, default=1, help='images of an evaluation (default: 1)')
    parser.add_argument('--rounds', type=int, default=10, help='steps of each network (default: 10)')
    parser.add_argument('--warm-up', type=int, default=3, help='steps before them (default: 3)')
    parser.add_argument('--device', choices=('cpu', 'cuda'), help='(default: the GPU, if there is one)')
    parser.add_argument('--bf16', action='store_true', help='autocast to bfloat16')
    parser.add_argument('--channels-last', action='store_true', help='memory format of networks and images')
    parser.add_argument('--compile', action='store_true', help='compile the networks, generation included')
    parser.add_argument('--cfg-options', nargs='+', action=DictAction, help='override settings: key=value ...')
    add_result_options(parser, picture='where time and memory go')
    return parser.parse_args()


def print_tables(result: dict) -> None:
    """Print times and ratios, and what a step holds."""
    console = Console(width=None if sys.stdout.isatty() else 130)
    table = Table('network', 'step, s', 'to dense', 'images/s', 'generation', 'evaluation, s', 'to dense')
    for name, each in result['summary'].items():
        share = f'{each["generation_share"]:.1%}' if 'generation_share' in each else ''
        step, evaluation = (
            (f'{each[key]:.4f} +- {each[f"{key}_spread"]:.0%}', f'{each[f"{key}_ratio"]:.3f}x')
            for key in ('step', 'evaluation')
        )
        table.add_row(name, *step, f'{each["images_per_second"]:.1f}', share, *evaluation)
    console.print(table)
    print('Medians; ratios are medians of the ratios of each round.')
    columns = [key for key in (*HELD, 'peak_bytes') if key in result['networks']['dense']['bytes']]
    table = Table('network', *(f'{key.removesuffix("_bytes")}, MB' for key in columns), 'to dense')
    for name, each in result['networks'].items():
        ratio = f'{result["summary"][name]["memory_ratio"]:.3f}x'
        table.add_row(name, *(f'{each["bytes"][key] / 1e6:.2f}' for key in columns), ratio)
    console.print(table)


def main() -> None:
    args = parse_args()
    with one_line_errors():
        check_result_options(args.out, overwrite=args.overwrite, picture=args.picture)
        cfg = read_config(args.config, args.cfg_options)
        given = {key: value for key in ('batch_size', 'size') if (value := getattr(args, key)) is not None}
        wanted = {**training_load(cfg), **given}
        for key in ('batch_size', 'size'):
            if key not in wanted:
                raise CSGError(f'{args.config} does not say its {key}; give --{key.replace("_", "-")}')
        options = {key: getattr(args, key) for key in ('rounds', 'warm_up', 'bf16', 'channels_last', 'compile')}
        device = args.device or ('cuda' if torch.cuda.is_available() else 'cpu')
        load = Load(**wanted, **options, eval_batch_size=args.eval_batch_size, device=device)
        progress = partial(track, description='Timing', console=Console(stderr=True))
        with redirect_stdout(sys.stderr):  # mmengine prints notes, stdout is for the result
            networks = measure_speed(cfg, load, track=progress)
        figures = {'load': asdict(load), 'summary': summarise_speed(networks, load), 'networks': networks}
        result = write_result(args.out, {**figures, 'made_with': made_with(seed=0)})
        if args.picture:
            draw_speed(networks, load, args.picture, title=Path(args.config).stem)
    print(json.dumps(result)) if args.json else print_tables(result)


if __name__ == '__main__':
    main()
