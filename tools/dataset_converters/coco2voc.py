"""Turn COCO's instance annotations into masks of Pascal VOC's 20 classes, for COCOVOCDataset.

Other categories are background; where instances overlap and in crowd regions the mask is 255, ignored.
If interrupted, run the command again to resume.
"""

import argparse
import os
import sys
from pathlib import Path

from csg_seg.cli import console, options
from csg_seg.cli.failures import one_line_errors

with one_line_errors():
    from csg_seg.data.coco import make_masks


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument('annotations', type=Path, help="COCO's instances_train2017.json or a file like it")
    parser.add_argument('images', type=Path, help='folder of the images it lists, such as data/coco/train2017')
    parser.add_argument(
        '--out',
        type=Path,
        required=True,
        default=argparse.SUPPRESS,
        help='folder to write masks/NAME.png and list.txt into, such as data/coco/voc_train2017',
    )
    parser.add_argument(
        '--min-area',
        type=float,
        default=1000,
        metavar='PX',
        help="leave out images whose instances of VOC's classes have no larger area than this, added up",
    )
    parser.add_argument(
        '--jobs', type=int, default=os.cpu_count(), metavar='N', help='processes at a time, each of about half a GB'
    )
    options.add_json(parser, 'print the counts as JSON alone')
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    with one_line_errors():
        bar = console.progress_bar()
        try:
            counts = make_masks(
                args.annotations, args.images, args.out, min_area=args.min_area, jobs=args.jobs, progress=bar
            )
        except KeyboardInterrupt:
            sys.exit('interrupted; run the command again to resume')

    def print_line(result: dict) -> None:
        print('{kept} of {images} images have a mask, {made} of them made now, in {out}'.format(**result))

    console.print_result({'out': str(args.out), **counts}, print_line, as_json=args.json)


if __name__ == '__main__':
    main()
