"""Turn a CSG checkpoint into a plain one, which the dense config loads without csg_seg."""

import argparse
from pathlib import Path

from csg_seg import materialise
from csg_seg.cli import console, options
from csg_seg.cli.failures import one_line_errors
from csg_seg.files import write_tensors

with one_line_errors():
    from csg_seg.errors import CSGError
    from csg_seg.layers.bank import find_bank
    from csg_seg.mm.checkpoints.reading import load_weights, read_checkpoint
    from csg_seg.mm.model import build_model
    from csg_seg.running.configs import read_config


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    options.add_config(parser, 'CSG config file')
    options.add_checkpoint(parser)
    options.add_out(parser, 'plain checkpoint to write (.pth)')
    options.add_overwrite(parser)
    options.add_cfg_options(parser)
    options.add_json(parser, 'print JSON instead of a line')
    return parser.parse_args()


def print_line(result: dict) -> None:
    print('{out}: plain, {params:,} parameters, {bytes:,} bytes'.format(**result))


def main() -> None:
    args = parse_args()
    out = Path(args.out)
    with one_line_errors():
        options.check_out(out, overwrite=args.overwrite, endings=['.pth', '.pt'], inputs=[args.config, args.checkpoint])
        model = build_model(read_config(args.config, args.cfg_options))
        if find_bank(model) is None:
            raise CSGError(f'{args.config}: a dense config; give the CSG config of the checkpoint')
        checkpoint = read_checkpoint(args.checkpoint)
        load_weights(model, checkpoint['state_dict'])
        plain = materialise(model)
        meta = {key: checkpoint['meta'][key] for key in ('dataset_meta',) if key in checkpoint['meta']}
        write_tensors(out, {'meta': meta, 'state_dict': plain.state_dict()})
    params = sum(each.numel() for each in plain.parameters())
    console.print_result(
        {'out': str(out), 'params': params, 'bytes': out.stat().st_size}, print_line, as_json=args.json
    )


if __name__ == '__main__':
    main()
