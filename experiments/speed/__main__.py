"""Time training steps and evaluations of a network dense, generated and materialised, and measure its memory."""

import argparse
from dataclasses import asdict
from pathlib import Path

from csg_seg.cli.console import notes_to_stderr, print_result, print_table, progress_bar
from csg_seg.cli.failures import one_line_errors
from csg_seg.cli.options import add_cfg_options, add_config

with one_line_errors():
    import torch

    from csg_seg.cli.results import add_result_options, check_result_options, made_with, write_result
    from csg_seg.errors import CSGError
    from csg_seg.running.configs import read_config

    from .picture import draw_speed
    from .timing import HELD, Load, matmul_rate, measure_speed, summarise_speed, training_load


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog='python -m experiments.speed', description=__doc__)
    add_config(parser, 'CSG config file')
    parser.add_argument('--batch-size', type=int, help="images in a training step (default: the config's)")
    parser.add_argument('--size', type=int, nargs=2, help="height and width (default: the config's crop)")
    parser.add_argument('--eval-batch-size', type=int, default=1, help='images in an evaluation (default: 1)')
    parser.add_argument('--rounds', type=int, default=10, help='measured steps of each network (default: 10)')
    parser.add_argument('--warm-up', type=int, default=3, help='steps before the measured ones (default: 3)')
    parser.add_argument('--device', choices=('cpu', 'cuda'), help='(default: the GPU, if there is one)')
    parser.add_argument('--bf16', action='store_true', help='autocast to bfloat16')
    parser.add_argument('--channels-last', action='store_true', help='use channels-last memory format')
    parser.add_argument('--accumulate', type=int, default=1, help='batches in a training step (default: 1)')
    parser.add_argument('--compile', action='store_true', help='compile the networks, generation included')
    parser.add_argument(
        '--without-ahead',
        action='store_true',
        help='also measure CSG with weights neither made ahead nor cached',
    )
    parser.add_argument(
        '--float32-generation',
        action='store_true',
        help="with --bf16: also measure CSG with precision='float32'",
    )
    add_cfg_options(parser)
    add_result_options(parser, picture='where time and memory go')
    return parser.parse_args()


def print_tables(result: dict) -> None:
    """Print times, ratios, and the memory of a step."""
    columns = ('network', 'step, s', 'to dense', 'floor', 'images/s', 'generation', 'evaluation, s', 'to dense')
    rows = []
    for name, each in result['summary'].items():
        share = f'{each["generation_share"]:.1%}' if 'generation_share' in each else ''
        step, evaluation = (
            (f'{each[key]:.4f}±{each[f"{key}_spread"]:.0%}', f'{each[f"{key}_ratio"]:.3f}x')
            for key in ('step', 'evaluation')
        )
        rows.append((name, *step, f'{each["floor"]:.3f}x', f'{each["images_per_second"]:.1f}', share, *evaluation))
    print_table(columns, rows, width=130)
    print(
        'Medians; each ratio is the median over the rounds. Floor: the ratio of operations in a step, each at the '
        'speed of its precision.'
    )
    keys = [key for key in (*HELD, 'peak_bytes') if key in result['networks']['dense']['bytes']]
    held = ('network', *(f'{key.removesuffix("_bytes")}, MB' for key in keys), 'to dense')
    rows = []
    for name, each in result['networks'].items():
        ratio = f'{result["summary"][name]["memory_ratio"]:.3f}x'
        rows.append((name, *(f'{each["bytes"][key] / 1e6:.2f}' for key in keys), ratio))
    print_table(held, rows, width=130)


def main() -> None:
    args = parse_args()
    with one_line_errors():
        check_result_options(args.out, overwrite=args.overwrite, picture=args.picture)
        cfg = read_config(args.config, args.cfg_options)
        given = {key: value for key in ('batch_size', 'size') if (value := getattr(args, key)) is not None}
        wanted = {**training_load(cfg), **given}
        for key in ('batch_size', 'size'):
            if key not in wanted:
                raise CSGError(f'{args.config} does not specify its {key}; give --{key.replace("_", "-")}')
        options = {
            key: getattr(args, key) for key in ('rounds', 'warm_up', 'bf16', 'channels_last', 'compile', 'accumulate')
        }
        device = args.device or ('cuda' if torch.cuda.is_available() else 'cpu')
        load = Load(**wanted, **options, eval_batch_size=args.eval_batch_size, device=device)
        progress = progress_bar('Timing')
        with notes_to_stderr():
            also = {key: getattr(args, key) for key in ('without_ahead', 'float32_generation')}
            networks = measure_speed(cfg, load, **also, track=progress)
        computed = torch.bfloat16 if load.bf16 else torch.float32
        rates = {str(dtype).removeprefix('torch.'): matmul_rate(device, dtype) for dtype in (torch.float32, computed)}
        slower = rates[str(computed).removeprefix('torch.')] / rates['float32']
        summary = summarise_speed(networks, load, slower_generation=slower)
        figures = {'load': asdict(load), 'summary': summary, 'matmul_rates': rates, 'networks': networks}
        result = write_result(args.out, {**figures, 'made_with': made_with(seed=0)})
        if args.picture:
            draw_speed(networks, load, args.picture, title=Path(args.config).stem)
    print_result(result, print_tables, as_json=args.json)


if __name__ == '__main__':
    main()
