"""Rename the tensors of somebody else's checkpoint, in order, to those of a config's network."""

import argparse
from pathlib import Path

from csg_seg.cli import console, options
from csg_seg.cli.failures import one_line_errors
from csg_seg.files import write_tensors

with one_line_errors():
    from csg_seg.deploy.renaming import read_state_dict, rename_in_order
    from csg_seg.errors import CSGError
    from csg_seg.layers.bank import find_bank
    from csg_seg.mm.model import build_model
    from csg_seg.running.configs import read_config


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    options.add_config(parser, 'dense config file of the same network')
    parser.add_argument('checkpoint', help='checkpoint of other code (.pth)')
    options.add_out(parser, 'checkpoint to write (.pth)')
    parser.add_argument('--entry', help='entry of the file that holds the tensors (default: the only one)')
    options.add_cfg_options(parser)
    options.add_overwrite(parser)
    options.add_json(parser, 'print JSON instead of lines')
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    out = Path(args.out)
    with one_line_errors():
        options.check_out(out, overwrite=args.overwrite, endings=['.pth'], inputs=[args.config, args.checkpoint])
        given = read_state_dict(args.checkpoint, args.entry)
        model = build_model(read_config(args.config, args.cfg_options))
        if find_bank(model) is not None:
            raise CSGError(f'{args.config}: a CSG config; give the dense config of the network')
        renamed, added = rename_in_order(given, model.state_dict())
        write_tensors(out, {'meta': {}, 'state_dict': renamed})

    def print_lines(result: dict) -> None:
        print(f'{out}: {result["tensors"]} tensors')
        for name in result['zero_biases']:
            print(f'{name} is not in the checkpoint and is zero')
        print(f'equal shapes do not prove that the layers match; test it: python tools/test.py {args.config} {out}')

    result = {'checkpoint': str(out), 'tensors': len(renamed), 'zero_biases': added}
    console.print_result(result, print_lines, as_json=args.json)


if __name__ == '__main__':
    main()
