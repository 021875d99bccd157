"""Segmentation data sets that mmsegmentation lacks."""

from mmseg.datasets import BaseSegDataset, PascalVOCDataset
from mmseg.registry import DATASETS


@DATASETS.register_module()
class CamVidDataset(BaseSegDataset):
    """CamVid with the usual 11 classes, 360 x 480 pixels.

    Brostow et al., "Semantic object classes in video", Pattern Recognition
    Letters 2009; class grouping and colours of SegNet (Badrinarayanan et al., 2017).
    Layout: ``images/{train,val,test}/*.jpg`` and ``labels/{train,val,test}/*.png``.
    Labels are grey images with class ids 0 to 10, and 255 for void.
    """

    METAINFO = {
        'classes': (
            'sky', 'building', 'pole', 'road', 'pavement', 'tree',
            'sign', 'fence', 'car', 'pedestrian', 'bicyclist',
        ),
        'palette': [
            [128, 128, 128], [128, 0, 0], [192, 192, 128], [128, 64, 128], [60, 40, 222], [128, 128, 0],
            [192, 128, 128], [64, 64, 128], [64, 0, 128], [64, 64, 0], [0, 128, 192],
        ],
    }  # fmt: skip


@DATASETS.register_module()
class KvasirDataset(BaseSegDataset):
    """Kvasir-SEG: polyps in images of endoscopy, of various sizes.

    Jha et al., "Kvasir-SEG: A Segmented Polyp Dataset", MMM 2020.
    Layout: ``images/{train,val,test}/*.jpg`` and ``labels/{train,val,test}/*.png``.
    Labels are grey images: 0 background, 1 polyp.
    """

    METAINFO = {'classes': ('background', 'polyp'), 'palette': [[0, 0, 0], [255, 255, 255]]}


@DATASETS.register_module()
class COCOVOCDataset(BaseSegDataset):
    """COCO with background and the 20 classes of Pascal VOC.

    Lin et al., "Microsoft COCO: Common Objects in Context", ECCV 2014; classes
    and masks as in torchvision's segmentation reference.
    Layout: COCO's folder of images, and ``masks/*.png`` and ``list.txt`` written by
    ``tools/dataset_converters/coco2voc.py``.
    """

    METAINFO = PascalVOCDataset.METAINFO
