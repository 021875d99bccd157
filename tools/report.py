"""Say what a config stores: parameters, bytes, layers and generators, against its dense network."""

import argparse
import json
import sys
from functools import partial
from pathlib import Path

from csg_seg import summarise
from csg_seg.cli.errors import one_line_errors
from csg_seg.cli.options import check_out

with one_line_errors():
    from mmengine.config import DictAction
    from rich.console import Console
    from rich.progress import track

    from csg_seg.errors import CSGError
    from csg_seg.mm.checkpoints.reading import load_weights, read_checkpoint
    from csg_seg.mm.model import build_model
    from csg_seg.mm.plan_files.curve import draw_curve, mark_settings
    from csg_seg.mm.plan_files.dense import build_dense
    from csg_seg.mm.running.configs import read_config
    from csg_seg.planning.planner import trade_off


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('config', help='config file')
    parser.add_argument('--checkpoint', help='also check that this checkpoint fits the config')
    parser.add_argument('--curve', help='of a dense config: draw size against predicted error into this file (.png)')
    parser.add_argument('--overwrite', action='store_true', help='replace CURVE when it exists')
    parser.add_argument('--cfg-options', nargs='+', action=DictAction, help='override settings: key=value ...')
    parser.add_argument('--json', action='store_true', help='print JSON instead of a table')
    return parser.parse_args()


def draw(cfg, args: argparse.Namespace) -> None:
    """Draw the trade-off curve of the dense network and its trained weights."""
    if not args.checkpoint:
        raise CSGError('--curve needs trained weights; give --checkpoint, of the dense config')
    check_out(args.curve, overwrite=args.overwrite, option='--curve', endings=['.png', '.svg', '.pdf'])
    model = build_dense(cfg, args.checkpoint)
    curve = trade_off(model, track=partial(track, description='spectra', console=Console(stderr=True), transient=True))
    draw_curve(curve, mark_settings(model), args.curve, title=Path(args.config).stem)


def main() -> None:
    args = parse_args()
    with one_line_errors():
        cfg = read_config(args.config, args.cfg_options)
        model = build_model(cfg)
        if args.checkpoint:
            load_weights(model, read_checkpoint(args.checkpoint)['state_dict'])
        summary = summarise(model)
        if args.curve:
            draw(cfg, args)
            print(f'curve: {args.curve}', file=sys.stderr)
    print(json.dumps(summary.to_dict()) if args.json else summary)


if __name__ == '__main__':
    main()
