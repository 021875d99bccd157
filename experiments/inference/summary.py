"""For the documents: time and memory of the ways to run a network."""

from collections.abc import Callable

from experiments.markdown import link, markdown, read

QUESTION = 'What memory and time does a network need from each kind of file?'
VERDICT = 'weights that are made when they are needed save memory and cost time; see [deploy](../docs/deploy.md)'


def inference() -> str:
    """Time to the first image, and memory, of each way."""
    rows = []
    for name, each in read('inference-deeplabv3-r50')['ways'].items():
        seconds = (f'{each[key]:.2f}' for key in ('load', 'first_image', 'next_image'))
        rows.append((name, f'{each["file_bytes"] / 1e6:.1f}', *seconds, f'{each["peak_bytes"] / 1e6:.0f}'))
    columns = ('file', 'MB', 'seconds to load', 'to the first image', 'for the next', 'peak memory, MB')
    return markdown(columns, rows)


def result() -> str:
    """The result of ``experiments.inference``."""
    ways = read('inference-deeplabv3-r50')['ways']
    names = ('dense', 'compact', 'compact, low memory')
    peaks = ', '.join(f'{name} {ways[name]["peak_bytes"] / 1e6:.0f} MB' for name in names)
    ratio = ways['compact']['first_image'] / ways['dense']['first_image']
    both = f'first image from the compact file after {ratio:.2f} of the dense time'
    return f'{link("inference-deeplabv3-r50")}: DeepLabV3-R50, peak {peaks}; {both}'


TABLES: dict[str, Callable[[], str]] = {'inference': inference}
