"""Turn a CSG checkpoint into a plain one, for the dense config and without csg_seg."""

import argparse
import json
from pathlib import Path

from csg_seg import materialise
from csg_seg.cli.errors import one_line_errors
from csg_seg.cli.options import check_out
from csg_seg.files import write_tensors

with one_line_errors():
    from mmengine.config import DictAction

    from csg_seg.mm.checkpoints.reading import load_weights, read_checkpoint
    from csg_seg.mm.model import build_model
    from csg_seg.mm.running.configs import read_config


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('config', help='CSG config file')
    parser.add_argument('checkpoint', help='checkpoint of training (.pth) or compact checkpoint (.safetensors)')
    parser.add_argument('--out', required=True, help='plain checkpoint to write (.pth)')
    parser.add_argument('--overwrite', action='store_true', help='replace OUT when it exists')
    parser.add_argument('--cfg-options', nargs='+', action=DictAction, help='override settings: key=value ...')
    parser.add_argument('--json', action='store_true', help='print JSON instead of a line')
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    out = Path(args.out)
    with one_line_errors():
        check_out(out, overwrite=args.overwrite, inputs=[args.config, args.checkpoint])
        cfg = read_config(args.config, args.cfg_options)
        checkpoint = read_checkpoint(args.checkpoint)
        model = build_model(cfg)
        load_weights(model, checkpoint['state_dict'])
        state_dict = materialise(model).state_dict()
        meta = {key: checkpoint['meta'][key] for key in ('dataset_meta',) if key in checkpoint['meta']}
        write_tensors(out, {'meta': meta, 'state_dict': state_dict})
    result = {'out': str(out), 'params': sum(each.numel() for each in model.parameters()), 'bytes': out.stat().st_size}
    print(json.dumps(result) if args.json else '{out}: plain, {params:,} parameters, {bytes:,} bytes'.format(**result))


if __name__ == '__main__':
    main()
