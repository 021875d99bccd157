"""For the documents: scores of networks that start from a dense one."""

from collections.abc import Callable, Iterable

from experiments.markdown import link, markdown, read

QUESTION = 'How does a trained dense network become a generated one?'
VERDICT = "fit, then a teacher's logits and block outputs; see [from trained weights](../docs/from_trained_weights.md)"


WAYS = {
    'scratch': 'from scratch, labels',
    'narrow': 'a narrower dense network, equal in size or a little smaller, logits of the same teacher',
    'fitted': 'fit, no training',
    'fine-tune': 'fit, then labels',
    'logits': 'fit, then logits',
    'features': "**fit, then logits and every block's output**",
    'anneal': 'the same, weights passing from dense to generated (removed)',
    'proximal': 'the same, the dense network pulled to the generator for two epochs first',
}


def carry_over(ways: Iterable[str] = WAYS) -> str:
    """Accuracy after three epochs, by network, ratio and way."""
    found = {depth: read(f'carry-over-resnet{depth}')['ratios'] for depth in (20, 32, 56)}
    rows = []
    for way in ways:
        label = WAYS[way]
        cells = []
        for each in (each for ratios in found.values() for each in ratios.values()):
            score = each['fitted']['score'] if way == 'fitted' else each['networks'][way]['mean']
            cells.append(f'**{score:.2f}**' if label.startswith('**') else f'{score:.2f}')
        rows.append((label, *cells))
    return markdown(
        ('way', *(f'ResNet-{depth}, {ratio}x' for depth, ratios in found.items() for ratio in ratios)), rows
    )


def carry_over_camvid() -> str:
    """MIoU on CamVid after the fit and after training."""
    result = read('carry-over-camvid')
    (trained,) = read('camvid-dense-trained-on')['networks'].values()
    dense = result['dense']
    rows = [('dense', f'{dense["stored_params"]:,}', f'{dense["score"]:.2f}', f'{trained["mean"]:.2f}')]
    for ratio, each in result['ratios'].items():
        (network,) = each['networks'].values()
        fitted, score = each['fitted']['score'], network['mean']
        rows.append((f'{ratio}x', f'{network["stored_params"]:,}', f'{fitted:.2f}', f'{score:.2f}'))
    return markdown(('network', 'parameters stored', 'mIoU after the fit', 'after 250 steps'), rows)


def result() -> str:
    """The result of ``experiments.carry_over``."""
    score = read('carry-over-resnet56')['ratios']['2.3']['networks']['features']['mean']
    names = ('resnet20', 'resnet32', 'resnet56', 'resnet56-10e', 'camvid')
    links = ', '.join(link(f'carry-over-{name}') for name in names)
    return f'{links}: ResNet-56 at 2.3x {score:.2f} after three epochs'


TABLES: dict[str, Callable[[], str]] = {
    'carry-over': carry_over,
    'carry-over-camvid': carry_over_camvid,
    'dropped': lambda: carry_over(('features', 'anneal', 'proximal')),
}
