"""For the documents: time and memory of networks of equal size."""

from collections.abc import Callable

from experiments.markdown import link, markdown, read
from experiments.runs.rows import score_text, summarise

from .measure import held_in_step

QUESTION = 'What do networks of equal size cost in time and memory?'
VERDICT = 'of those that make full weights, CSG is among the fastest; networks that compute less are faster'


PEERS = ('csg-10x', 'csg-47x', 'hypernetwork-10x', 't-basis-10x', 'tucker-10x', 'cp-10x', 'separable-10x', 'narrow-10x')


def peers(name: str, scores: str = '') -> str:
    """Time and memory of each network in ``results/NAME.json``, with its score in ``results/SCORES.json``."""
    measured = {each['cell']: each for each in summarise(read(scores)['rows'])} if scores else {}
    rows = []
    for cell, each in read(name)['networks'].items():
        ratios = [f'{each[f"{key}_ratio"]:.2f}x' for key in ('step', 'evaluation')]
        megabytes = f'{held_in_step(each) / 1e6:.0f}'
        row = [cell, f'{each["stored_params"]:,}', f'{each["flops"] / 1e9:.2f}', *ratios, megabytes]
        row.append(f'{1000 * each["first_image"]:.0f}')
        if scores:
            row.append(score_text(measured[cell]['test']) if cell in measured else '')
        rows.append(row)
    columns = ['network', 'parameters stored', 'GFLOPs', 'step to dense', 'evaluation to dense', 'MB in a step']
    columns += ['ms to load and first image', *(['test mIoU'] if scores else [])]
    return markdown(columns, rows)


def result() -> str:
    """The result of ``experiments.peers``."""
    networks = read('peers-deeplabv3-r18')['networks']
    steps = ', '.join(f'{name} {networks[name]["step_ratio"]:.2f}' for name in PEERS)
    return f'{link("peers-deeplabv3-r18")}: a step of DeepLabV3-R18, relative to dense: {steps}'


TABLES: dict[str, Callable[[], str]] = {
    'peers-resnet18-96': lambda: peers('peers-resnet18-96'),
    'peers-resnet18-224': lambda: peers('peers-resnet18-224'),
    'peers-deeplabv3-r18': lambda: peers('peers-deeplabv3-r18', scores='camvid'),
}
