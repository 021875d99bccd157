"""Count what a config stores, compared with its dense network; or print the csg of a checkpoint."""

import argparse
import sys
from pathlib import Path

from csg_seg import summarise
from csg_seg.cli import console, options
from csg_seg.cli.failures import one_line_errors

with one_line_errors():
    from csg_seg.errors import CSGError
    from csg_seg.layers.bank import find_bank
    from csg_seg.mm.checkpoints.reading import load_weights, read_checkpoint, read_csg
    from csg_seg.mm.model import build_model
    from csg_seg.mm.plan_files import build_dense, draw_curve, mark_settings, write_csg
    from csg_seg.planning.planner import trade_off
    from csg_seg.retrofitting.automatic import is_automatic
    from csg_seg.running.configs import read_config
    from csg_seg.storage.compact import PICKLES


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    options.add_config(parser, 'config file; or a checkpoint of a CSG network, to print the csg that it was made with')
    parser.add_argument('--checkpoint', help='also check that this checkpoint fits the config')
    parser.add_argument('--curve', help='with a dense --checkpoint: draw predicted error against size (.png)')
    options.add_overwrite(parser, 'replace CURVE when it exists')
    options.add_cfg_options(parser)
    options.add_json(parser)
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    with one_line_errors():
        if Path(args.config).suffix in ('.safetensors', *PICKLES):
            csg = read_csg(args.config)
            console.print_result({'csg': csg}, lambda _: print(write_csg(csg)), as_json=args.json)
            return
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
        bank = find_bank(model)
        csg = [generator.settings.to_csg(position) for position, generator in enumerate(bank or ())]
    found = f'\n\n{write_csg(csg)}' if is_automatic(cfg.model.get('csg')) else ''
    console.print_result({**summary.to_dict(), 'csg': csg}, lambda _: print(f'{summary}{found}'), as_json=args.json)


if __name__ == '__main__':
    main()
