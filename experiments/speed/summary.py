"""For the documents: time and memory of steps and evaluations."""

from collections.abc import Callable

from experiments.markdown import link, markdown, megabytes, percent, read

QUESTION = 'How long do a step and an evaluation take, and what memory do they need?'
VERDICT = 'generation costs little if images are many or large; see [speed](../docs/speed.md)'


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
            ratios = (f'{each["step_ratio"]:.3f}x', f'{each["floor"]:.3f}x' if network == 'csg' else '')
            times = (f'{each["step"]:.3f}', *ratios, percent(each['step_spread'], 0))
            share = percent(each['generation_share'], 1) if 'generation_share' in each else ''
            evaluations = (f'{1000 * each["evaluation"]:.1f}', f'{each["evaluation_ratio"]:.3f}x')
            spread = percent(each['evaluation_spread'], 0)
            memory = (' + '.join(map(megabytes, parts)), f'{each["memory_ratio"]:.3f}x')
            rows.append((label if network == 'dense' else '', network, *times, share, *evaluations, spread, *memory))
    held = 'MB: parameters + gradients + optimizer + activations'
    step = ('s per step', 'to dense', 'floor', 'spread', 'generation')
    evaluation = ('ms to evaluate', 'to dense', 'spread')
    return markdown(('training step of', '', *step, *evaluation, held, 'to dense'), rows, left=(0, 1, 10))


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


NETWORKS = {
    'csg': 'CSG',
    'csg, generated once': 'CSG, generated once',
    'csg, float32': "CSG, `precision='float32'`",
}


def precision() -> str:
    """Steps and evaluations of CSG relative to dense, by size of the images and precision of generation."""
    rows = []
    for size in ('180x240', '360x480'):
        summary = read(f'precision-deeplabv3-r18-{size}')['summary']
        for network in ('csg', 'csg, float32'):
            ratios = (f'{summary[network][key]:.3f}x' for key in ('step_ratio', 'floor', 'evaluation_ratio'))
            rows.append((size.replace('x', ' x '), NETWORKS[network], *ratios))
    return markdown(('images', '', 'step to dense', 'floor', 'evaluation to dense'), rows, left=(0, 1))


def accumulation() -> str:
    """Steps of several batches, relative to dense."""
    summary = read('accumulation-deeplabv3-r18')['summary']
    rows = [
        (label, *(f'{summary[network][key]:.3f}x' for key in ('step_ratio', 'floor')))
        for network, label in NETWORKS.items()
    ]
    return markdown(('', 'step to dense', 'floor'), rows)


def speed_summary() -> str:
    """Time and memory of steps and time of evaluations, relative to dense."""
    measured = {label.split(',')[0]: f'speed-{name}' for name, label in TIMED.items()}
    measured |= {f'DeepLabV3-R18, bf16, {size}': f'precision-deeplabv3-r18-{size}' for size in ('180x240', '360x480')}
    keys = ('step', 'memory', 'evaluation')
    rows = []
    for label, name in measured.items():
        csg = read(name)['summary']['csg']
        rows.append((label, *(f'{csg[f"{key}_ratio"]:.3f}' for key in keys)))
    return markdown(('on a CPU', *keys), rows)


def result() -> str:
    """The result of ``experiments.speed``."""
    first, second = (read(f'speed-{name}')['summary']['csg'] for name in TIMED)
    step, evaluation = f'{first["step_ratio"]:.3f}', f'{first["evaluation_ratio"]:.3f}'
    others = f'{second["step_ratio"]:.3f}, {second["evaluation_ratio"]:.3f}'
    links = [link(f'speed-{name}') for name in TIMED]
    return f'{links[0]}: step {step}, evaluation {evaluation} of dense; {links[1]}: {others}'


TABLES: dict[str, Callable[[], str]] = {
    'precision': precision,
    'accumulation': accumulation,
    'speed': speed,
    'ahead': ahead,
    'speed-summary': speed_summary,
}
