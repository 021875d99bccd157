"""Convert a CIFAR-10 checkpoint that the method's authors (or akamaster) released, and write its config."""

import argparse
from pathlib import Path

from csg_seg.cli import console, options
from csg_seg.cli.failures import one_line_errors
from csg_seg.files import write_tensors, write_whole

with one_line_errors():
    from csg_seg.deploy.conversion import convert_released
    from csg_seg.running.configs import read_config

LIKE = Path(__file__).parents[2] / 'configs' / 'cifar10' / 'resnet20_b192-200e_cifar10.py'


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('file', help='released checkpoint (.t7, .th); its tensors show network and settings')
    options.add_out(parser, 'checkpoint to write (.pth); the config is written next to it (.py)')
    parser.add_argument('--like', default=LIKE, help='config to take data and schedule from (default: full CIFAR-10)')
    options.add_overwrite(parser, 'replace files that exist')
    options.add_json(parser, 'print JSON instead of lines')
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    checkpoint = Path(args.out)
    config = checkpoint.with_suffix('.py')
    with one_line_errors():
        options.check_out(checkpoint, overwrite=args.overwrite, endings=['.pth'], inputs=[args.file])
        options.check_out(config, overwrite=args.overwrite, inputs=[args.like])
        converted = convert_released(args.file, read_config(args.like))
        write_whole(config, lambda partial_path: partial_path.write_text(converted.config.pretty_text))
        write_tensors(checkpoint, {'meta': {}, 'state_dict': converted.state_dict})
    released, summary = converted.released, converted.summary
    csg = released.csg or {}
    result = {
        'network': released.network,
        'slice_shape': csg.get('slice_shape'),
        'code_dim': csg.get('code_dim'),
        'stored_params': summary.stored_params,
        'dense_params': summary.dense_params,
        'compression_ratio': summary.compression_ratio,
        'stored_accuracy': released.accuracy,
        'checkpoint': str(checkpoint),
        'config': str(config),
    }

    def print_lines(_: dict) -> None:
        print(f'network: {released.network}, {"CSG" if csg else "dense"}')
        if csg:
            print(f'slice shape: {csg["slice_shape"]}, code length: {csg["code_dim"]}')
        print(summary.headline())
        print(f'stored accuracy: {"none" if released.accuracy is None else f"{released.accuracy:.2f} %"}')
        print(f'test it: python tools/test.py {config} {checkpoint}')

    console.print_result(result, print_lines, as_json=args.json)


if __name__ == '__main__':
    main()
