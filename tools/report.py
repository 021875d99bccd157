"""Say what a config stores: parameters, bytes, layers and generators, against its dense network."""

import argparse
import json

from csg_seg import summarise
from csg_seg.cli import one_line_errors

with one_line_errors():
    from mmengine.config import DictAction

    from csg_seg.mm.checkpoint import load_weights, read_checkpoint
    from csg_seg.mm.launch import read_config
    from csg_seg.mm.model import build_model


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('config', help='config file')
    parser.add_argument('--checkpoint', help='also check that this checkpoint fits the config')
    parser.add_argument('--cfg-options', nargs='+', action=DictAction, help='override settings: key=value ...')
    parser.add_argument('--json', action='store_true', help='print JSON instead of a table')
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    with one_line_errors():
        cfg = read_config(args.config)
        cfg.merge_from_dict(args.cfg_options or {})
        model = build_model(cfg)
        if args.checkpoint:
            load_weights(model, read_checkpoint(args.checkpoint)['state_dict'])
        summary = summarise(model)
    print(json.dumps(summary.to_dict()) if args.json else summary)


if __name__ == '__main__':
    main()
