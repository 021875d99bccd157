"""Choose CSG settings for a trained dense network that meet a budget, and write their config."""

import argparse
import json
import sys
from functools import partial
from pathlib import Path

from csg_seg import plan, retrofit, summarise
from csg_seg.cli.errors import one_line_errors
from csg_seg.cli.options import check_out
from csg_seg.files import write_whole

with one_line_errors():
    from rich.console import Console
    from rich.progress import track
    from rich.table import Table

    from csg_seg.mm.plan_files.config import describe_layers, planned_config
    from csg_seg.mm.plan_files.dense import build_dense
    from csg_seg.mm.running.configs import read_config


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('config', help='dense config file')
    parser.add_argument('--ratio', type=float, help='budget: dense parameters over stored parameters, at least')
    parser.add_argument('--params', type=int, help='budget: stored parameters, at most')
    parser.add_argument('--bytes', type=int, help='budget: bytes of the state dict, at most')
    parser.add_argument('--checkpoint', help='trained dense checkpoint (default: the untrained start values)')
    parser.add_argument('--out', required=True, help='config to write (.py)')
    parser.add_argument('--overwrite', action='store_true', help='replace OUT when it exists')
    parser.add_argument('--json', action='store_true', help='print JSON instead of a table')
    return parser.parse_args()


def print_table(planned, summary) -> None:
    """Print each generator and the totals."""
    table = Table()
    for column in ('layers', 'slices of', 'code length', 'convs', 'parameters stored', 'relative errors'):
        table.add_column(column, justify='left' if column == 'layers' else 'right')
    for position, (csg, generator) in enumerate(zip(planned.csg, summary.generators, strict=True)):
        fed = [layer for layer in summary.layers if layer.generator == position]
        errors = [planned.layers[layer.name] for layer in fed]
        stored = generator.stored_params + sum(layer.stored_params for layer in fed)
        shape, code = 'x'.join(map(str, csg['slice_shape'])), str(csg['code_dim'])
        numbers = (shape, code, str(len(fed)), f'{stored:,}', f'{min(errors):.2f} to {max(errors):.2f}')
        table.add_row(describe_layers(csg), *numbers)
    Console(width=None if sys.stdout.isatty() else 110).print(table)
    print(summary.headline())
    print(f'predicted relative error over all convs, before training: {planned.relative_error:.3f}')


def main() -> None:
    args = parse_args()
    out = Path(args.out)
    with one_line_errors():
        check_out(out, overwrite=args.overwrite, endings=['.py'], inputs=[args.config])
        cfg = read_config(args.config)
        model = build_dense(cfg, args.checkpoint)
        if not args.checkpoint:
            print('no --checkpoint: planned from UNTRAINED weights, whose errors mean little', file=sys.stderr)
        progress = partial(track, description='spectra', console=Console(stderr=True), transient=True)
        planned = plan(model, ratio=args.ratio, params=args.params, bytes=args.bytes, track=progress)
        text = planned_config(planned, args.config, cfg, out, trained=bool(args.checkpoint))
        write_whole(out, lambda partial_path: partial_path.write_text(text))
    if args.json:
        print(json.dumps({**planned.to_dict(), 'trained': bool(args.checkpoint), 'config': str(out)}))
    else:
        print_table(planned, summarise(retrofit(model, planned.csg)))
        print(f'config: {out}')


if __name__ == '__main__':
    main()
