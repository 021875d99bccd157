"""For the documents: scores of trained cells."""

from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

from experiments.markdown import link, markdown, read

from .rows import score_text
from .rows import summarise as summarise_cells
from .table import ROOT, read_table

QUESTION = 'What do several configs score with several seeds?'
VERDICT = 'as good as dense within the noise'
# The trained networks that the repository holds, and the cells that trained them.
MODELS = {'csg-s16-d48_deeplabv3_r18-d16_camvid-180x240': 'csg-trained-20x-40e'}
CAMVID = (
    'runs/tables/camvid.yml',
    'runs/tables/camvid_small.yml',
    'runs/tables/camvid_trained.yml',
    'rivals/tables/camvid_layers.yml',
    'rivals/tables/camvid_generators.yml',
)

# For a first look: a network and its images, its data set in results/, the first part of its cells' names, and sizes.
IN_SHORT = (
    ('half-width DeepLabV3-R18, CamVid', 'camvid-90x120', '', ('6x', '10x', '30x', '100x')),
    ('the same, Kvasir-SEG', 'kvasir-96x96', '', ('6x', '30x', '100x')),
    ('quarter-width UNet, CamVid', 'camvid-90x120', 'unet-', ('10x',)),
    ('the same, Kvasir-SEG', 'kvasir-96x96', 'unet-', ('4x', '10x')),
    ('DeepLabV3+ with an ImageNet encoder, CamVid', 'camvid-90x120', 'efficientnet-', ('4x',)),
    ('full-width DeepLabV3-R18, CamVid at 180 x 240', 'camvid', '', ('10x', '20x', '47x', '100x')),
)
# Columns of that table, and the cells that they show, of which the first that was trained counts.
SHORT_COLUMNS = {
    'CSG': ('csg-auto-{}', 'csg-{}'),
    'CSG, continued': ('csg-trained-{}', 'csg-trained-{}-40e'),
    'separable': ('separable-{}',),
    'narrow': ('narrow-{}',),
    'low rank (Tucker)': ('tucker-{}',),
    'pruned': ('pruned-{}',),
}
# The cells of the README's table.
HEADLINE = (
    'dense',
    'csg-auto-6x',
    'separable-6x',
    'narrow-6x',
    'csg-auto-30x',
    'separable-30x',
    'narrow-30x',
)


def runs(*tables: str, only: str = '*', costs: str = '') -> str:
    """Scores of the trained networks of some tables.

    Args:
        tables: their files, relative to ``experiments``; all of one data set, network and image size.
        only: pattern of the names of cells to list.
        costs: name of a file of ``experiments.peers``, which adds operations and the time of a training step.
    """
    read_tables = [read_table(ROOT / 'experiments' / path) for path in tables]
    names = dict.fromkeys(cell.name for table in read_tables for cell in table.cells if fnmatchcase(cell.name, only))
    trained = {each['cell']: each for each in summarise_cells(read(read_tables[0].dataset)['rows'])}
    cells = [trained[name] for name in names if name in trained]
    metric = cells[0]['metric']
    splits = [split for split in ('val', 'test') if any(each[split] for each in cells)]
    measured = read(costs)['networks'] if costs else {}
    by_epochs = any(each['epochs'] for each in cells)
    rounded = any(each['int8_bytes'] for each in cells)
    rows = []
    for each in cells:
        ratio = f'{each["dense_params"] / each["stored_params"]:.1f}x'
        row = [each['cell'], f'{each["stored_params"]:,}', ratio]
        row += [each['epochs']] if by_epochs else []
        row.append(each['seeds'])
        row += [score_text(each[split]) for split in splits]
        if rounded:
            row += (
                [f'{each["int8_bytes"] / 1e6:.2f}', score_text(each['int8_test'])] if each['int8_bytes'] else ['', '']
            )
        if costs:
            cost = measured.get(each['cell'])
            row += [f'{cost["flops"] / 1e9:.2f}', f'{cost["step_ratio"]:.2f}x'] if cost else ['', '']
        rows.append(row)
    columns = ['network', 'parameters stored', 'ratio']
    columns += ['epochs'] if by_epochs else []
    columns += ['seeds', *(f'{split} {metric}' for split in splits)]
    columns += ['int8 file, MB', f'test {metric} of int8'] if rounded else []
    columns += ['GFLOPs', 'step to dense'] if costs else []
    return markdown(columns, rows)


def headline() -> str:
    """Size, operations and scores of networks on two data sets, for a first look."""
    camvid, kvasir = (
        {each['cell']: each for each in summarise_cells(read(name)['rows'])}
        for name in ('camvid-90x120', 'kvasir-96x96')
    )
    costs = read('peers-deeplabv3-r18-w32')['networks']
    rows = []
    for name in HEADLINE:
        each = camvid[name]
        row = [name, f'{each["stored_params"]:,}', f'{each["int8_bytes"] / 1e6:.2f} MB']
        row.append(f'{costs[name]["flops"] / 1e9:.2f}')
        scores = [cells[name][split] for cells in (camvid, kvasir) for split in ('val', 'test')]
        rows.append([*row, *map(score_text, scores)])
    columns = [f'{data_set} {split}' for data_set in ('CamVid', 'Kvasir') for split in ('val', 'test')]
    return markdown(('network', 'parameters stored', 'int8 file', 'GFLOPs', *columns), rows)


def in_short() -> str:
    """Differences of all kinds of networks to dense ones."""
    rows: list[Sequence[object]] = []
    for label, data_set, start, sizes in IN_SHORT:
        cells = {each['cell']: each for each in summarise_cells(read(data_set)['rows'])}
        for size in sizes:
            row: list[object] = [label if size == sizes[0] else '', size]
            for names in SHORT_COLUMNS.values():
                cell = next((name for each in names if (name := f'{start}{each.format(size)}') in cells), None)
                row.append(_difference(cells[cell], cells[f'{start}dense']) if cell else '')
            rows.append(row)
    return markdown(('network, images', 'ratio', *SHORT_COLUMNS), rows)


def _difference(cell: Mapping[str, Any], dense: Mapping[str, Any]) -> str:
    """Return the points (val / test) between a cell and dense, both averaged over their seeds."""
    differences = [cell[split][0] - dense[split][0] for split in ('val', 'test')]
    points = ' / '.join(f'{each:+.1f}'.replace('-0.0', '+0.0') for each in differences)
    return points if cell['seeds'] > 1 else f'{points}\\*'


def models() -> str:
    """Bytes and scores of the networks in ``models``, beside the dense network that they are compared with."""
    cells = {each['cell']: each for each in read('camvid')['rows'] if each['seed'] == 0}
    dense = cells['dense']
    rows: list[Sequence[object]] = [
        ('dense, not included', f'{dense["stored_params"]:,}', '', dense['val'], dense['test'])
    ]
    for name, cell in MODELS.items():
        row, size = cells[cell], (ROOT / 'models' / f'{name}.safetensors').stat().st_size
        scores = [row['int8'][split] for split in ('val', 'test')]
        rows.append((f'`{name}`', f'{row["stored_params"]:,}', f'{size:,}', *scores))
    return markdown(('network', 'parameters stored', 'bytes', 'val mIoU', 'test mIoU'), rows)


def cifar10_subset() -> str:
    """Accuracy of ResNet-20 on a part of CIFAR-10."""
    rows: list[Sequence[object]] = []
    for label, each in zip(
        ('dense', 's12 d72', 's12 d72, random binary'), read('cifar10-npz')['networks'].values(), strict=True
    ):
        score = f'{each["mean"]:.2f}±{each["std"]:.2f}'
        rows.append((label, f'{each["stored_params"]:,}', f'{each["compression_ratio"]:.2f}x', score))
    return markdown(('network', 'parameters stored', 'ratio', 'accuracy, mean and standard deviation'), rows)


def result() -> str:
    """The result of ``experiments.runs``."""
    dense, csg, *_ = read('cifar10-npz')['networks'].values()
    scores = [f'{each["mean"]:.2f}±{each["std"]:.2f}' for each in (dense, csg)]
    both = f'dense {scores[0]}, CSG at {csg["compression_ratio"]:.2f}x {scores[1]}'
    return f'{link("cifar10-npz")}: ResNet-20 on a tenth of CIFAR-10, {both}'


TABLES: dict[str, Callable[[], str]] = {
    'camvid': lambda: runs(*CAMVID, costs='peers-deeplabv3-r18'),
    'camvid-90x120': lambda: runs('rivals/tables/camvid_90x120.yml', costs='peers-deeplabv3-r18-w32'),
    'learning-rate': lambda: runs('runs/tables/camvid_90x120_learning_rate.yml'),
    'kvasir-96x96': lambda: runs('rivals/tables/kvasir_96.yml'),
    'travel': lambda: runs('runs/tables/camvid_90x120_travel.yml', only='csg*'),
    'unet': lambda: runs('runs/tables/camvid_90x120_unet.yml'),
    'unet-kvasir': lambda: runs('runs/tables/kvasir_96_unet.yml'),
    'imagenet-encoder': lambda: runs('runs/tables/camvid_90x120_imagenet.yml'),
    'kvasir': lambda: runs('runs/tables/kvasir.yml'),
    'drawn': lambda: runs('runs/tables/drawn.yml'),
    'camvid-auto': lambda: runs('runs/tables/camvid_auto.yml', only='csg*'),
    'headline': headline,
    'in-short': in_short,
    'models': models,
    'cifar10': lambda: runs('runs/tables/cifar10.yml'),
    'cifar10-subset': cifar10_subset,
    'precision-scores': lambda: runs('runs/tables/cifar10_subset.yml'),
}
