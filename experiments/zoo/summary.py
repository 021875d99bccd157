"""For the documents: what the networks of each library gave."""

from collections.abc import Callable
from typing import Any

from experiments.markdown import RESULT_FILES, markdown

from .rows import RESULTS, read_rows, summarise_rows

QUESTION = 'Does every network of a library work?'
VERDICT = 'yes, except networks with momentum encoders, which are refused; see [supported](../docs/supported.md)'


def summaries() -> dict[str, dict[str, Any]]:
    """Return the summary of each library's rows."""
    scopes = ('mmseg', 'mmpretrain', 'torchvision', 'timm', 'smp', 'monai', 'transformers')
    return {scope: summarise_rows(read_rows(RESULT_FILES / f'zoo-{scope}.jsonl', scope)) for scope in scopes}


def zoo_results() -> str:
    """Results of the networks of each library."""
    rows = []
    for scope, each in summaries().items():
        least, middle, most = each['ratio']
        counts = each['results'].values()
        rows.append((scope, sum(counts), *counts, f'{least:.2f} to {most:.2f}', f'{middle:.2f}'))
    return markdown(('library', 'networks', *RESULTS, 'times smaller', 'median'), rows, left=(0, 8))


def zoo_convs() -> str:
    """Convs of the networks of each library that passed."""
    rows = []
    for scope, each in summaries().items():
        left = '; '.join(f'{count} {reason}' for reason, count in each['left_dense'].most_common())
        rows.append((scope, f'{each["generated"]:,}', each['on_losses'], left))
    return markdown(('library', 'convs generated', 'networks trained on losses', 'convs left dense'), rows, left=(0, 3))


def result() -> str:
    """The result of ``experiments.zoo``."""
    counts = [each['results'] for each in summaries().values()]
    total = {result: sum(each[result] for each in counts) for result in RESULTS}
    results = ', '.join(f'{count:,} {result}' for result, count in total.items())
    return f'`results/zoo-*.jsonl`: of {sum(total.values()):,} networks {results}'


TABLES: dict[str, Callable[[], str]] = {
    'zoo-results': zoo_results,
    'zoo-convs': zoo_convs,
}
