"""For the documents: time and memory of networks of equal size."""

from collections.abc import Callable

from experiments.markdown import link, read

QUESTION = 'What do networks of equal size cost in time and memory?'
VERDICT = 'CSG trains and evaluates like a dense network; networks that compute less are faster'


PEERS = ('csg-10x', 'csg-47x', 'hypernetwork-10x', 't-basis-10x', 'tucker-10x', 'cp-10x', 'separable-10x', 'narrow-10x')


def result() -> str:
    """The result of ``experiments.peers``."""
    networks = read('peers-deeplabv3-r18')['networks']
    steps = ', '.join(f'{name} {networks[name]["step_ratio"]:.2f}' for name in PEERS)
    return f'{link("peers-deeplabv3-r18")}: a step of DeepLabV3-R18, relative to dense: {steps}'


TABLES: dict[str, Callable[[], str]] = {}
