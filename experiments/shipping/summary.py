"""For the documents: scores and sizes on the way to the files that ship."""

from collections.abc import Callable

from experiments.markdown import link, markdown, read

QUESTION = "What does somebody else's checkpoint score at each stage, until its files ship?"
VERDICT = 'all tools take it; see [from trained weights](../docs/from_trained_weights.md#somebody-elses-checkpoint)'


def shipping() -> str:
    """Parameters, bytes and score of each stage."""
    rows = []
    for each in read('shipping-cgnet')['stages']:
        size = f'{each["bytes"]:,}' if 'bytes' in each else ''
        rows.append((each['name'], f'{each["stored_params"]:,}', size, f'{each["score"]:.2f}'))
    return markdown(('stage', 'parameters', 'bytes of the file', 'mIoU'), rows)


def result() -> str:
    """The result of ``experiments.shipping``."""
    scores = {each['name']: each['score'] for each in read('shipping-cgnet')['stages']}
    shown = '; '.join(f'{name} {score:.2f}' for name, score in scores.items())
    return f'{link("shipping-cgnet")}: mIoU of CGNet on CamVid: {shown}'


TABLES: dict[str, Callable[[], str]] = {'shipping': shipping}
