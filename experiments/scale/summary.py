"""For the documents: time and memory of large networks."""

from collections.abc import Callable

from experiments.markdown import link, markdown, read

QUESTION = 'How do retrofit, fit, save and load scale with the network?'
VERDICT = 'about linear in the parameters'


def scale() -> str:
    """Time and memory of large networks."""
    phases = ('retrofit', 'fit', 'save', 'load')
    rows = []
    for name, each in read('scale')['networks'].items():
        seconds = (f'{each["seconds"][phase]:.2f}' for phase in phases)
        sizes = (f'{each[key] / 1e6:.1f}' for key in ('dense_bytes', 'compact_bytes'))
        rows.append((name, f'{each["params"] / 1e6:.2f} M', *seconds, *sizes, f'{each["peak_bytes"] / 1e6:.0f}'))
    seconds = (f'{phase}, s' for phase in phases)
    return markdown(('network', 'parameters', *seconds, 'dense, MB', 'compact, MB', 'peak, MB'), rows)


def result() -> str:
    """The result of ``experiments.scale``."""
    each = read('scale')['networks']['deeplabv3_r50-d8_4xb4-20k_voc12-512x512']
    return f'{link("scale")}: fit of {each["params"] / 1e6:.0f} M parameters {each["seconds"]["fit"]:.2f} s'


TABLES: dict[str, Callable[[], str]] = {
    'scale': scale,
}
