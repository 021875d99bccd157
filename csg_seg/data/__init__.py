"""Make data sets: masks of VOC's classes from COCO, and drawn images."""
