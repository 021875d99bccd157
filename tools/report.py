"""Count what a config stores: parameters, bytes, layers and generators, compared with its dense network."""

import argparse
import sys
from pathlib import Path

from csg_seg import summarise
from csg_seg.cli import console, options
from csg_seg.cli.failures import one_line_errors

with one_line_errors():
    from csg_seg.errors import CSGError
    from csg_seg.mm.checkpoints.reading import load_weights, read_checkpoint
    from csg_seg.mm.model import build_model
    from csg_seg.mm.plan_files import build_dense, draw_curve, mark_settings
    from csg_seg.planning.planner import trade_off
    from csg_seg.running.configs import read_config


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    options.add_config(parser)
    parser.add_argument('--checkpoint', help='also check that this checkpoint fits the config')
    parser.add_argument('--curve', help='with a dense --checkpoint: draw predicted error against size (.png)')
    options.add_overwrite(parser, 'replace CURVE when it exists')
    options.add_cfg_options(parser)
    options.add_json(parser)
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    with one_line_errors():
        cfg = read_config(args.config, args.cfg_options)
        model = build_model(cfg)
        if args.checkpoint:
            load_weights(model, read_checkpoint(args.checkpoint)['state_dict'])
        summary = summarise(model)
        if args.curve:
            if not args.checkpoint:
                raise CSGError('--curve needs trained weights; give --checkpoint, of the dense config')
            endings = ['.png', '.svg', '.pdf']
            options.check_out(args.curve, overwrite=args.overwrite, option='--curve', endings=endings)
            dense = build_dense(cfg, args.checkpoint)
            curve = trade_off(dense, track=console.progress_bar('spectra', transient=True))
            draw_curve(curve, mark_settings(dense), args.curve, title=Path(args.config).stem)
            print(f'curve: {args.curve}', file=sys.stderr)
    console.print_result(summary.to_dict(), lambda _: print(summary), as_json=args.json)


if __name__ == '__main__':
    main()
