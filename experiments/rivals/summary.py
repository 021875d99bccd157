"""For the documents: scores of other generators."""

from collections.abc import Callable

from experiments.markdown import link, markdown, read

from .compared import GENERATORS, config_name

QUESTION = 'Are other generators better at equal size?'
VERDICT = 'no; see [other methods](../docs/other_methods.md)'


def generators() -> str:
    """Accuracy of different generators at equal size."""
    networks = read('generators-resnet20')['networks']
    rows = []
    for name, label in GENERATORS.items():
        each = networks[config_name(name)]
        rows.append((label, f'{each["stored_params"]:,}', f'{each["mean"]:.2f}'))
    return markdown(('generator', 'parameters stored', 'top-1'), rows)


def result() -> str:
    """The result of ``experiments.rivals``."""
    networks = read('generators-resnet20')['networks']
    names = {'linear': 's4-d57', 'tensor ring': 's4-d52-ring18', 'MLP': 's4-d52-mlp48'}
    scores = (f'{label} {networks[config_name(name)]["mean"]:.2f}' for label, name in names.items())
    return f'{link("generators-resnet20")}: {", ".join(scores)}'


TABLES: dict[str, Callable[[], str]] = {
    'generators': generators,
}
