"""For the documents: networks that are smaller and faster."""

from collections.abc import Callable

from experiments.markdown import link, markdown, read

QUESTION = 'Does CSG combine with fewer channels and with int8 inference?'
VERDICT = 'yes; see [smaller and faster](../docs/smaller_and_faster.md)'
RESULT = 'smaller-and-faster-camvid'


def smaller_and_faster() -> str:
    """Size, operations, time and scores of each network, in float32 and in int8."""
    rows = []
    for name, each in read(RESULT)['networks'].items():
        for kind, onnx in each['onnx'].items():
            sizes = (f'{each["shipped_bytes"] / 1e6:.2f}', f'{onnx["bytes"] / 1e6:.1f}')
            cost = (f'{each["flops"] / 1e9:.2f}', f'{onnx["milliseconds"]:.1f}')
            rows.append((name, kind, *sizes, *cost, *(f'{onnx[split]:.2f}' for split in ('val', 'test'))))
    columns = ('network', 'ONNX', 'shipped, MB', 'ONNX, MB', 'GFLOPs', 'ms an image', 'val mIoU', 'test mIoU')
    return markdown(columns, rows, left=(0, 1))


def result() -> str:
    """The result of ``experiments.smaller_and_faster``."""
    networks = read(RESULT)['networks']
    named = (('dense', 'float32'), ('csg-10x', 'int8'), ('narrow-csg-41x', 'int8'))
    parts = [
        f'{name} in {kind} {networks[name]["shipped_bytes"] / 1e6:.2f} MB, '
        f'{networks[name]["onnx"][kind]["milliseconds"]:.1f} ms, {networks[name]["onnx"][kind]["test"]:.2f}'
        for name, kind in named
    ]
    return f'{link(RESULT)}: DeepLabV3-R18, file shipped, time an image, test mIoU: {"; ".join(parts)}'


TABLES: dict[str, Callable[[], str]] = {'smaller-and-faster': smaller_and_faster}
