"""For the documents: scores of trained cells."""

from collections.abc import Callable, Sequence

from experiments.markdown import link, markdown, read

from .rows import score_text
from .rows import summarise as summarise_cells

QUESTION = 'What do several configs score with several seeds?'
VERDICT = 'as good as dense within the noise'


def runs(dataset: str, network: str, size: str) -> str:
    """Scores of each cell of one network in ``results/DATASET.json``."""
    cells = [
        each for each in summarise_cells(read(dataset)['rows']) if each['network'] == network and each['size'] == size
    ]
    metric = cells[0]['metric']
    rows = []
    for each in cells:
        ratio = f'{each["dense_params"] / each["stored_params"]:.1f}x'
        scores = [score_text(each[split]) for split in ('val', 'test')]
        rows.append((each['cell'], f'{each["stored_params"]:,}', ratio, each['epochs'], each['seeds'], *scores))
    columns = ('network', 'parameters stored', 'ratio', 'epochs', 'seeds', f'val {metric}', f'test {metric}')
    return markdown(columns, rows)


def cifar10() -> str:
    """Accuracy of ResNet-20 on a part of CIFAR-10."""
    rows: list[Sequence[object]] = []
    for label, each in zip(
        ('dense', 's12 d72', 's12 d72, random binary'), read('cifar10-npz')['networks'].values(), strict=True
    ):
        score = f'{each["mean"]:.2f} +- {each["std"]:.2f}'
        rows.append((label, f'{each["stored_params"]:,}', f'{each["compression_ratio"]:.2f}x', score))
    return markdown(('network', 'parameters stored', 'ratio', 'accuracy, mean and standard deviation'), rows)


def result() -> str:
    """The result of ``experiments.runs``."""
    dense, csg, *_ = read('cifar10-npz')['networks'].values()
    scores = [f'{each["mean"]:.2f} +- {each["std"]:.2f}' for each in (dense, csg)]
    both = f'dense {scores[0]}, CSG at {csg["compression_ratio"]:.2f}x {scores[1]}'
    return f'{link("cifar10-npz")}: ResNet-20 on a tenth of CIFAR-10, {both}'


TABLES: dict[str, Callable[[], str]] = {
    'cifar10': cifar10,
}
