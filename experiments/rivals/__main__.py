"""Train ResNet-20 with each kind of generator at equal size; print parameters and scores."""

import argparse

from csg_seg.cli.failures import one_line_errors

from .compared import config_paths

with one_line_errors():
    from experiments.runs.__main__ import add_options, compare


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog='python -m experiments.rivals', description=__doc__)
    add_options(parser, seeds=[0])
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    args.configs = config_paths()
    compare(args)


if __name__ == '__main__':
    main()
