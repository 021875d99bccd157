"""Turn COCO's instance annotations into masks of Pascal VOC's 20 classes, for COCOVOCDataset.

Other categories are background; where instances overlap and in crowd regions the mask is 255, ignored.
Stopped half-way, the same command goes on where it was.
"""

import argparse
import json
import os
import sys
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.progress import track

from csg_seg.cli.errors import one_line_errors
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
    parser.add_argument('--json', action='store_true', help='print the counts as JSON alone')
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    bar = partial(track, console=Console(stderr=True))
    with one_line_errors():
        try:
            counts = make_masks(
                args.annotations, args.images, args.out, min_area=args.min_area, jobs=args.jobs, progress=bar
            )
        except KeyboardInterrupt:
            sys.exit('stopped; the same command goes on from here')
    if args.json:
        print(json.dumps({'out': str(args.out), **counts}))
    else:
        print('{kept} of {images} images have a mask, {made} of them made now, in'.format(**counts), args.out)


if __name__ == '__main__':
    main()
