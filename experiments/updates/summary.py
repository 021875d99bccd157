"""For the documents: bytes and scores of the variants of one base."""

from collections.abc import Callable

from experiments.markdown import link, markdown, read

QUESTION = 'How many bytes does a variant of a network need as an update, and what does it score?'
VERDICT = 'see [one base, many networks](../docs/many_networks.md)'
TRAINED = {
    'csg-10x': 'the base',
    'csg-10x-codes': 'codes',
    'csg-10x-codes-norms': 'codes and norm layers',
    'csg-10x-all': 'everything',
}


def updates() -> str:
    """Bytes and scores of the base and its updates, in each precision."""
    (int8,) = [row['int8']['bytes'] for row in read('camvid')['rows'] if (row['cell'], row['seed']) == ('dense', 0)]
    rows = []
    for each in read('updates-camvid')['files']:
        dense = int8 if each['dtype'] == 'int8' else each['dense_bytes']
        ratio = f'{dense / each["bytes"]:.1f}x'
        size = f'{each["bytes"] / 1e6:.2f}'
        rows.append((TRAINED[each['cell']], each['dtype'], size, ratio, f'{each["test"]:.2f}', f'{each["val"]:.2f}'))
    return markdown(('trained', 'file', 'MB', 'dense / file', 'mIoU at dusk', 'mIoU by day'), rows, left=(0, 1))


def result() -> str:
    """The result of ``experiments.updates``."""
    files = {(each['cell'], each['dtype']): each for each in read('updates-camvid')['files']}
    base = files['csg-10x', 'int8']
    rest = ', '.join(
        f'{TRAINED[name]} {each["bytes"] / 1e6:.2f} MB for {each["test"] - base["test"]:+.1f} points of mIoU'
        for (name, dtype), each in files.items()
        if dtype == 'int8' and each is not base
    )
    return f'{link("updates-camvid")}: DeepLabV3-R18 at dusk, int8 updates of a base by day: {rest}'


TABLES: dict[str, Callable[[], str]] = {'updates': updates}
