"""Choose CSG settings that meet a size budget for a trained dense network, and write their config."""

import argparse
import sys
from pathlib import Path

from csg_seg import plan, retrofit, summarise
from csg_seg.cli import console, options
from csg_seg.cli.failures import one_line_errors
from csg_seg.files import write_whole

with one_line_errors():
    from csg_seg.mm.plan_files import build_dense, describe_layers, planned_config
    from csg_seg.running.configs import read_config


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    options.add_config(parser, 'dense config file')
    parser.add_argument('--ratio', type=float, help='size budget: at least this many dense parameters per stored one')
    parser.add_argument('--params', type=int, help='size budget: at most this many stored parameters')
    parser.add_argument('--bytes', type=int, help='size budget: at most this many bytes in the state dict')
    parser.add_argument('--checkpoint', help='trained dense checkpoint (default: untrained weights)')
    options.add_out(parser, 'config to write (.py)')
    options.add_overwrite(parser)
    options.add_json(parser)
    return parser.parse_args()


def print_plan(planned, summary) -> None:
    """Print each generator and the totals."""
    rows = []
    for position, (csg, generator) in enumerate(zip(planned.csg, summary.generators, strict=True)):
        layers = [layer for layer in summary.layers if layer.generator == position]
        errors = [planned.layers[layer.name] for layer in layers]
        stored = generator.stored_params + sum(layer.stored_params for layer in layers)
        shape, code = 'x'.join(map(str, csg['slice_shape'])), str(csg['code_dim'])
        numbers = (shape, code, str(len(layers)), f'{stored:,}', f'{min(errors):.2f} to {max(errors):.2f}')
        rows.append((describe_layers(csg), *numbers))
    console.print_table(('layers', 'slices of', 'code length', 'convs', 'parameters stored', 'relative errors'), rows)
    print(summary.headline())
    print(f'predicted relative error over all convs, before training: {planned.relative_error:.3f}')


def main() -> None:
    args = parse_args()
    out = Path(args.out)
    with one_line_errors():
        options.check_out(out, overwrite=args.overwrite, endings=['.py'], inputs=[args.config])
        cfg = read_config(args.config)
        model = build_dense(cfg, args.checkpoint)
        progress = console.progress_bar('spectra', transient=True)
        planned = plan(model, ratio=args.ratio, params=args.params, bytes=args.bytes, track=progress)
        if not args.checkpoint:
            print('no --checkpoint: planned from UNTRAINED weights, whose errors mean little', file=sys.stderr)
        text = planned_config(planned, args.config, cfg, out, trained=bool(args.checkpoint))
        write_whole(out, lambda partial: partial.write_text(text))

    def print_text(result: dict) -> None:
        print_plan(planned, summarise(retrofit(model, planned.csg)))
        print(f'config: {result["config"]}')

    result = {**planned.to_dict(), 'trained': bool(args.checkpoint), 'config': str(out)}
    console.print_result(result, print_text, as_json=args.json)


if __name__ == '__main__':
    main()
