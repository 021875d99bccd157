"""ONNX files quantised to int8 by onnxruntime."""

import platform
from collections.abc import Iterator, Sequence
from pathlib import Path

from numpy import ndarray
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

from csg_seg.errors import CSGError


def has_vnni() -> bool:
    """Say whether this CPU multiplies 8-bit integers into 32 bits; on other systems than Linux, assume so."""
    cpus = Path('/proc/cpuinfo')
    return not cpus.exists() or platform.machine() not in ('x86_64', 'AMD64') or 'vnni' in cpus.read_text()


class Images(CalibrationDataReader):
    """Normalised images ``(batch, 3, height, width)``, one after another."""

    def __init__(self, images: Sequence[ndarray]):
        self.left: Iterator[ndarray] = iter(images)

    def get_next(self) -> dict[str, ndarray] | None:
        """Return the next image as the file's input, None after the last."""
        image = next(self.left, None)
        return None if image is None else {'image': image}


def quantise(file: Path, images: Sequence[ndarray], out: Path) -> None:
    """Write an ONNX file in int8: weights with a scale for each channel, activations with one for each tensor.

    Args:
        file: from :func:`csg_seg.deploy.onnx_export.export_onnx`, in float32.
        images: normalised images, from whose activations the scales are measured.
        out: the file to write.

    Raises:
        CSGError: there are no images.
    """
    if not images:
        raise CSGError(f'{file}: no images to calibrate on; give some of the training images')
    quantize_static(
        file,
        out,
        Images(images),
        quant_format=QuantFormat.QDQ,
        per_channel=True,
        # onnxruntime computes faster with unsigned activations on x86.
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
        # Without VNNI, products of 8 bits overflow the 16 bits in which they are added.
        reduce_range=not has_vnni(),
    )
