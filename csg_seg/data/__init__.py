"""Data sets made here: COCO masks with the classes of VOC, and drawn images."""
