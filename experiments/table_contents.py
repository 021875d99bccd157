"""The tables of README and docs, a function for each, from the figures in results/."""

import json
import re
import statistics
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from .rivals.compared import GENERATORS, config_name
from .runs.rows import score_text
from .runs.rows import summarise as summarise_cells
from .zoo.rows import RESULTS, read_rows, summarise_rows

ROOT = Path(__file__).parents[1]
RESULT_FILES = ROOT / 'results'


def read(name: str) -> dict[str, Any]:
    """Return ``results/NAME.json``."""
    return json.loads((RESULT_FILES / f'{name}.json').read_text())


def markdown(columns: Sequence[str], rows: Iterable[Sequence[object]], *, left: Sequence[int] = (0,)) -> str:
    """Return a Markdown table; columns are right-aligned unless their position is in ``left``."""
    rule = ['---' if position in left else '---:' for position in range(len(columns))]
    lines = [' | '.join(map(str, row)) for row in (columns, *rows)]
    return '\n'.join([f'| {lines[0]} |', f'|{"|".join(rule)}|', *(f'| {line} |' for line in lines[1:])])


def demo() -> str:
    """Dense and CSG in ``make demo``."""
    result = read('demo')
    columns = ('network', 'parameters stored', 'compression', 'training checkpoint', 'mIoU', 'step time')
    rows = []
    for name, ratio, seconds in (('dense', 1.0, 1.0), ('csg', result['compression_ratio'], result['step_time_ratio'])):
        each = result[name]
        size = f'{each["checkpoint_bytes"]:,} bytes'
        rows.append(
            (name, f'{each["stored_params"]:,}', f'{ratio:.2f}x', size, f'{each["mIoU"]:.2f}', f'{seconds:.2f}x')
        )
    return markdown(columns, rows)


EXCHANGED = {'deeplabv3-r50': ('DeepLabV3-R50', 's16 d128'), 'resnet56': ('ResNet-56', 's12 d72')}
HELD = ('parameter_bytes', 'gradient_bytes', 'optimizer_bytes', 'all_reduced_bytes')


def exchange_summary() -> str:
    """Bytes of one rank, dense and CSG."""
    rows = []
    for name, (network, settings) in EXCHANGED.items():
        dense, csg = (each['all_reduced_bytes'] for each in read(f'exchange-{name}')['networks'].values())
        rows.append(
            (f'{network}, {settings}', f'{dense / 1e6:.2f} MB', f'{csg / 1e6:.2f} MB', f'{dense / csg:.2f} times')
        )
    first = 'one rank: parameters, gradients, optimizer state, and gradients all-reduced in a step, each'
    return markdown((first, 'dense', 'CSG', 'less'), rows)


def exchange_seconds() -> str:
    """Seconds of a step of DeepLabV3-R50 over each link."""
    links = read('exchange-deeplabv3-r50')['links']
    rows = [
        (f'link of {rate_name(rate)}', *(median(hooks['none']['seconds']) for hooks in networks.values()))
        for rate, networks in links.items()
        if rate != 'none'
    ]
    return markdown(('seconds of a training step of DeepLabV3-R50 on two CPU cores', 'dense', 'CSG'), rows)


def exchange_bytes() -> str:
    """Bytes of one rank, by kind, and the buckets."""
    rows = []
    for name, (network, settings) in EXCHANGED.items():
        for kind, each in zip(('dense', f'CSG {settings}'), read(f'exchange-{name}')['networks'].values(), strict=True):
            buckets = ' '.join(
                f'{one["bytes"] / 1e6:.1f}{chr(92) + "*" if one["generator"] else ""}' for one in each['buckets']
            )
            rows.append((f'{network}, {kind}', *(f'{each[key] / 1e6:.2f}' for key in HELD), buckets))
    columns = ('network', 'parameters', 'gradients', 'optimizer state', 'all-reduced in a step', 'buckets')
    return markdown(columns, rows, left=(0, 5))


def exchange_links(name: str) -> str:
    """Seconds of a step over each link, with each hook."""
    result = read(f'exchange-{name}')
    links = result['links']
    rows = []
    for kind, network in zip(('dense', 'CSG'), links['none'], strict=True):
        for hook in result['hooks']:
            cells = []
            for networks in links.values():
                seconds, first = networks[network][hook]['seconds'], next(iter(networks.values()))['none']['seconds']
                ratio = median(one / other for one, other in zip(seconds, first, strict=True))
                cells.append(f'{median(seconds)} ({ratio}x)')
            sent = statistics.median(links['none'][network][hook]['sent'])
            rows.append((kind, hook, f'{sent / 1e6:.1f}', *cells))
    return markdown(('network', 'hook', 'MB sent in a step', *map(rate_name, links)), rows, left=(0, 1))


def median(values: Iterable[float]) -> str:
    """Return the median with two decimals."""
    return f'{statistics.median(values):.2f}'


def rate_name(rate: str) -> str:
    """Return '100 Mbit/s' for '100mbit'."""
    return (
        'no limit'
        if rate == 'none'
        else re.sub(r'(\d+)(.)bit', lambda found: f'{found[1]} {found[2].upper()}bit/s', rate)
    )


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


TIMED = {
    'resnet56': 'ResNet-56, s12 d72, 64 images of 32 x 32',
    'deeplabv3-r18': 'DeepLabV3-R18, s16 d128, 4 images of 288 x 384',
}


def speed() -> str:
    """Time and memory of a training step and an evaluation."""
    rows = []
    for name, label in TIMED.items():
        result = read(f'speed-{name}')
        for network, each in result['summary'].items():
            held = result['networks'][network]['bytes']
            parts = (held[f'{part}_bytes'] for part in ('parameter', 'gradient', 'optimizer', 'activation'))
            times = (f'{each["step"]:.3f}', f'{each["step_ratio"]:.3f}x', percent(each['step_spread'], 0))
            share = percent(each['generation_share'], 1) if 'generation_share' in each else ''
            evaluations = (f'{1000 * each["evaluation"]:.1f}', f'{each["evaluation_ratio"]:.3f}x')
            spread = percent(each['evaluation_spread'], 0)
            memory = (' + '.join(map(megabytes, parts)), f'{each["memory_ratio"]:.3f}x')
            rows.append((label if network == 'dense' else '', network, *times, share, *evaluations, spread, *memory))
    held = 'MB: parameters + gradients + optimizer + activations'
    step = ('s per step', 'to dense', 'spread', 'generation')
    evaluation = ('ms to evaluate', 'to dense', 'spread')
    return markdown(('training step of', '', *step, *evaluation, held, 'to dense'), rows, left=(0, 1, 9))


def percent(share: float, digits: int) -> str:
    """Return a share in percent."""
    return f'{100 * share:.{digits}f} %'


def megabytes(count: int) -> str:
    """Return MB with two significant digits or more."""
    return f'{count / 1e6:.1f}' if count < 1e7 else f'{count / 1e6:.0f}'


def ahead() -> str:
    """Steps and evaluations with weights made ahead, and without."""
    labels = {'resnet56': TIMED['resnet56'], 'deeplabv3-r18': 'DeepLabV3-R18, s16 d128, 4 images of 144 x 192'}
    rows = []
    for name, label in labels.items():
        with_it, without = (read(f'ahead-{name}')['summary'][key] for key in ('csg', 'csg, not ahead'))
        cells = (f'{each[f"{key}_ratio"]:.3f}x' for key in ('step', 'evaluation') for each in (without, with_it))
        rows.append((label, *cells))
    columns = ('', 'step without', 'step with', 'evaluation without', 'evaluation with')
    return markdown(columns, rows)


def speed_targets() -> str:
    """Targets for time and memory, and the measured ratios."""
    rows = []
    for name, label in TIMED.items():
        csg = read(f'speed-{name}')['summary']['csg']
        ratios = [f'{csg[f"{key}_ratio"]:.3f}' for key in ('step', 'memory', 'evaluation')]
        rows.append((f'{label.split(",")[0]} on a CPU', *ratios[:2], '1.08', ratios[2], '1.02'))
    return markdown(('', 'step', 'memory', 'target', 'evaluation', 'target'), rows)


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


def summaries() -> dict[str, dict[str, Any]]:
    """Return the summary of each library's rows."""
    scopes = ('mmseg', 'mmpretrain', 'torchvision', 'timm')
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


def generators() -> str:
    """Accuracy of different generators at equal size."""
    networks = read('generators-resnet20')['networks']
    rows = []
    for name, label in GENERATORS.items():
        each = networks[config_name(name)]
        rows.append((label, f'{each["stored_params"]:,}', f'{each["mean"]:.2f}'))
    return markdown(('generator', 'parameters stored', 'top-1'), rows)


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


def runs(dataset: str, network: str, size: str) -> str:
    """Scores of each cell of one network in ``results/DATASET.json``."""
    cells = [
        each for each in summarise_cells(read(dataset)['rows']) if each['network'] == network and each['size'] == size
    ]
    metric = cells[0]['metric']
    rows = []
    for each in cells:
        ratio = f'{each["dense_params"] / each["stored_params"]:.1f}x'
        scores = [score_text(each[split]) for split in ('val', 'test')]
        rows.append((each['cell'], f'{each["stored_params"]:,}', ratio, each['epochs'], each['seeds'], *scores))
    columns = ('network', 'parameters stored', 'ratio', 'epochs', 'seeds', f'val {metric}', f'test {metric}')
    return markdown(columns, rows)


def cifar10() -> str:
    """Accuracy of ResNet-20 on a part of CIFAR-10."""
    rows: list[Sequence[object]] = []
    for label, each in zip(
        ('dense', 's12 d72', 's12 d72, random binary'), read('cifar10-npz')['networks'].values(), strict=True
    ):
        score = f'{each["mean"]:.2f} +- {each["std"]:.2f}'
        rows.append((label, f'{each["stored_params"]:,}', f'{each["compression_ratio"]:.2f}x', score))
    return markdown(('network', 'parameters stored', 'ratio', 'accuracy, mean and standard deviation'), rows)


def runs_result() -> str:
    """The result of ``experiments.runs``."""
    dense, csg, *_ = read('cifar10-npz')['networks'].values()
    scores = [f'{each["mean"]:.2f} +- {each["std"]:.2f}' for each in (dense, csg)]
    both = f'dense {scores[0]}, CSG at {csg["compression_ratio"]:.2f}x {scores[1]}'
    return f'{link("cifar10-npz")}: ResNet-20 on a tenth of CIFAR-10, {both}'


def speed_result() -> str:
    """The result of ``experiments.speed``."""
    first, second = (read(f'speed-{name}')['summary']['csg'] for name in TIMED)
    step, evaluation = f'{first["step_ratio"]:.3f}', f'{first["evaluation_ratio"]:.3f}'
    others = f'{second["step_ratio"]:.3f}, {second["evaluation_ratio"]:.3f}'
    links = [link(f'speed-{name}') for name in TIMED]
    return f'{links[0]}: step {step}, evaluation {evaluation} of dense; {links[1]}: {others}'


def exchange_result() -> str:
    """The result of ``experiments.exchange``."""
    result = read('exchange-deeplabv3-r50')
    dense, csg = (f'{each["all_reduced_bytes"] / 1e6:.2f}' for each in result['networks'].values())
    slow, fast = (median(hooks['none']['seconds']) for hooks in result['links']['100mbit'].values())
    return f'{link("exchange-deeplabv3-r50")}: {csg} MB for {dense}; at 100 Mbit/s {fast} s for {slow} s'


def federated_result() -> str:
    """The result of ``experiments.federated``."""
    result = read('federated-camvid')
    gained = {}
    for name, each in result['networks'].items():
        first, last = each['scores'][0], each['scores'][-1]
        gained[name] = f'{last["score"] - first["score"]:.1f}', f'{last["bytes"] / 1e6:,.0f} MB'
    (codes, codes_sent), (dense, dense_sent) = gained['codes'], gained['dense']
    both = f'codes gain {codes} points of mIoU for {codes_sent}, dense {dense} for {dense_sent}'
    return f'{link("federated-camvid")}: in {result["rounds"]} rounds, {both}'


def scale_result() -> str:
    """The result of ``experiments.scale``."""
    each = read('scale')['networks']['deeplabv3_r50-d8_4xb4-20k_voc12-512x512']
    return f'{link("scale")}: fit of {each["params"] / 1e6:.0f} M parameters {each["seconds"]["fit"]:.2f} s'


def zoo_result() -> str:
    """The result of ``experiments.zoo``."""
    counts = [each['results'] for each in summaries().values()]
    total = {result: sum(each[result] for each in counts) for result in RESULTS}
    results = ', '.join(f'{count:,} {result}' for result, count in total.items())
    return f'`results/zoo-*.jsonl`: of {sum(total.values()):,} networks {results}'


def fits_result() -> str:
    """The result of ``experiments.fits``."""
    each = read('fits-resnet20')['settings']['s12-d72']
    inputs, ours = (each['ways'][way]['accuracy_bn'] for way in ('input moments', 'free overhang (csg_seg.fit)'))
    after = f'with second moments of inputs {inputs:.1f} % after the fit at {each["compression_ratio"]:.2g}x'
    return f'{link("fits-resnet20")}: {after}, `csg_seg.fit` {ours:.1f} % (BatchNorm recomputed)'


def carry_over_result() -> str:
    """The result of ``experiments.carry_over``."""
    score = read('carry-over-resnet56')['ratios']['2.3']['networks']['features']['mean']
    names = ('resnet20', 'resnet32', 'resnet56', 'resnet56-10e', 'camvid')
    links = ', '.join(link(f'carry-over-{name}') for name in names)
    return f'{links}: ResNet-56 at 2.3x {score:.2f} after three epochs'


def peers_result() -> str:
    """The result of ``experiments.peers``."""
    networks = read('peers-deeplabv3-r18')['networks']
    steps = ', '.join(f'{name} {networks[name]["step_ratio"]:.2f}' for name in PEERS)
    return f'{link("peers-deeplabv3-r18")}: a step of DeepLabV3-R18, relative to dense: {steps}'


def rivals_result() -> str:
    """The result of ``experiments.rivals``."""
    networks = read('generators-resnet20')['networks']
    names = {'linear': 's4-d57', 'tensor ring': 's4-d52-ring18', 'MLP': 's4-d52-mlp48'}
    scores = (f'{label} {networks[config_name(name)]["mean"]:.2f}' for label, name in names.items())
    return f'{link("generators-resnet20")}: {", ".join(scores)}'


PEERS = ('csg-10x', 'csg-47x', 'hypernetwork-10x', 't-basis-10x', 'tucker-10x', 'cp-10x', 'separable-10x', 'narrow-10x')


def link(name: str) -> str:
    """Return a link from experiments/README.md to ``results/NAME.json``."""
    return f'[{name}](../results/{name}.json)'


# Name, question, result and verdict of each experiment.
EXPERIMENTS: dict[str, tuple[str, Callable[[], str], str]] = {
    'runs': ('What do several configs score with several seeds?', runs_result, 'as good as dense within the noise'),
    'speed': (
        'How long do a step and an evaluation take, and what memory do they need?',
        speed_result,
        'generation costs a few percent of a step; see [speed](../docs/speed.md)',
    ),
    'exchange': (
        'How many bytes do workers hold and exchange, and how long is a step over a slow link?',
        exchange_result,
        'faster where the link is slow; see [distributed](../docs/distributed.md)',
    ),
    'federated': (
        'Is it enough to exchange codes in federated averaging?',
        federated_result,
        'codes suffice to improve; one seed, short runs',
    ),
    'scale': (
        'How do retrofit, fit, save and load scale with the network?',
        scale_result,
        'about linear in the parameters',
    ),
    'zoo': (
        'Does every network of a library work?',
        zoo_result,
        'yes, except networks with momentum encoders, which are refused; see [supported](../docs/supported.md)',
    ),
    'fits': (
        'Which error should the fit minimise?',
        fits_result,
        'inputs help before training but need images; `csg_seg.fit` minimises the error of weights',
    ),
    'carry_over': (
        'How does a trained dense network become a generated one?',
        carry_over_result,
        "fit, then a teacher's logits and block outputs; see [from trained weights](../docs/from_trained_weights.md)",
    ),
    'peers': (
        'What do networks of equal size cost in time and memory?',
        peers_result,
        'CSG trains and evaluates like a dense network; networks that compute less are faster',
    ),
    'rivals': ('Are other generators better at equal size?', rivals_result, 'no; see [rivals](rivals/README.md)'),
}


def experiments() -> str:
    """Questions and results of all experiments."""
    rows = [(f'`{name}`', asks, result(), verdict) for name, (asks, result, verdict) in EXPERIMENTS.items()]
    return markdown(('experiment', 'question', 'result', 'verdict'), rows, left=range(4))


TABLES: dict[str, Callable[[], str]] = {
    'demo': demo,
    'exchange-summary': exchange_summary,
    'exchange-seconds': exchange_seconds,
    'exchange-bytes': exchange_bytes,
    'exchange-links-deeplabv3-r50': lambda: exchange_links('deeplabv3-r50'),
    'exchange-links-resnet56': lambda: exchange_links('resnet56'),
    'federated': federated,
    'speed': speed,
    'ahead': ahead,
    'speed-targets': speed_targets,
    'scale': scale,
    'zoo-results': zoo_results,
    'zoo-convs': zoo_convs,
    'carry-over': carry_over,
    'carry-over-camvid': carry_over_camvid,
    'dropped': lambda: carry_over(('features', 'anneal', 'proximal')),
    'generators': generators,
    'fits': fits,
    'cifar10': cifar10,
    'experiments': experiments,
}
