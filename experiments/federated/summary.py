"""For the documents: scores during federated averaging."""

from collections.abc import Callable

from experiments.markdown import link, markdown, read

QUESTION = 'Is it enough to exchange codes in federated averaging?'
VERDICT = 'codes improve the score for few bytes, and stay below dense; one seed, short runs'


def federated() -> str:
    """MIoU during federated averaging."""
    labels = {
        'dense': ('dense', 'everything'),
        'csg': ('CSG, s16 d128', 'everything'),
        'codes': ('CSG, s16 d128', 'codes'),
    }
    networks = read('federated-camvid')['networks']
    start, first, *later = [point['round'] for point in networks['dense']['scores']]
    assert start == 0
    rows = []
    for name, each in networks.items():
        scores = (f'{point["score"]:.2f}' for point in each['scores'])
        rows.append((*labels[name], f'{each["bytes"] / 1e6:.2f}', *scores, f'{each["scores"][-1]["bytes"] / 1e6:,.0f}'))
    rounds = ('start', f'after {first} rounds', *map(str, later))
    columns = ('network', 'exchanged', 'MB of one exchange', *rounds, 'MB to and from all workers')
    return markdown(columns, rows, left=(0, 1))


def result() -> str:
    """The result of ``experiments.federated``."""
    result = read('federated-camvid')
    gained = {}
    for name, each in result['networks'].items():
        first, last = each['scores'][0], each['scores'][-1]
        gained[name] = f'{last["score"] - first["score"]:.1f}', f'{last["bytes"] / 1e6:,.0f} MB'
    (codes, codes_sent), (dense, dense_sent) = gained['codes'], gained['dense']
    both = f'codes gain {codes} points of mIoU for {codes_sent}, dense {dense} for {dense_sent}'
    return f'{link("federated-camvid")}: in {result["rounds"]} rounds, {both}'


TABLES: dict[str, Callable[[], str]] = {
    'federated': federated,
}
