"""For the documents: errors and accuracy after different fits."""

from collections.abc import Callable

from experiments.markdown import link, markdown, read

QUESTION = 'Which error should the fit minimise?'
VERDICT = 'inputs help before training but need images; `csg_seg.fit` minimises the error of weights'


FITS = {
    'truncated SVD': 'truncated SVD, overhang as zeros',
    'SVD, layers at unit norm': 'the same, each layer weighted by `1 / norm(W)^2`',
    'SVD, layers at unit mean square': 'the same, by `parameters / norm(W)^2`',
    'free overhang (csg_seg.fit)': '**overhang ignored: `csg_seg.fit`**',
    'free, layers at unit norm': 'overhang ignored, by `1 / norm(W)^2`',
    'free, unit filters': 'overhang ignored, filters at unit norm, their scale absorbed by BatchNorm',
    'free, permuted channels': 'overhang ignored, hidden channels of each block ordered to make slices similar',
    'input energies': 'weighted by the mean square of input channels, layers by their output',
    'input moments': "weighted by all second moments of a slice's inputs, layers by their output",
    'input moments, unit outputs': 'the same, filters at unit output, their scale absorbed by BatchNorm',
}


def fits() -> str:
    """Errors and accuracy after different fits."""
    settings = read('fits-resnet20')['settings']
    rows = []
    for way, label in FITS.items():
        found = [each['ways'][way] for each in settings.values()]
        cells = (
            f'{each["weight_error"]:.2f}, {each["output_error"]:.2f}: {each["accuracy"]:.1f}, {each["accuracy_bn"]:.1f}'
            for each in found
        )
        rows.append((label, *cells))
    columns = [
        f'{each["slice_shape"][0]}x{each["slice_shape"][1]}, {each["compression_ratio"]:.2g}x'
        for each in settings.values()
    ]
    return markdown(('way', *columns), rows, left=range(len(columns) + 1))


def result() -> str:
    """The result of ``experiments.fits``."""
    each = read('fits-resnet20')['settings']['s12-d72']
    inputs, ours = (each['ways'][way]['accuracy_bn'] for way in ('input moments', 'free overhang (csg_seg.fit)'))
    after = f'with second moments of inputs {inputs:.1f} % after the fit at {each["compression_ratio"]:.2g}x'
    return f'{link("fits-resnet20")}: {after}, `csg_seg.fit` {ours:.1f} % (BatchNorm recomputed)'


TABLES: dict[str, Callable[[], str]] = {
    'fits': fits,
}
