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
    'csg, autocast': "CSG, `precision='autocast'`",
    'csg, generated once': "CSG, `precision='autocast'`, generated once",
}


def variants(name: str, evaluation: bool) -> str:
    """Steps, and evaluations if wanted, of variants of CSG relative to dense."""
    rows = []
    for network, label in NETWORKS.items():
        each = read(name)['summary'].get(network)
        if each is not None:
            ratios = [f'{each[key]:.3f}x' for key in ('step_ratio', 'floor', 'evaluation_ratio')]
            rows.append((label, *ratios[: 3 if evaluation else 2]))
    return markdown(('', 'step to dense', 'floor', 'evaluation to dense')[: 4 if evaluation else 3], rows)


def speed_targets() -> str:
    """Targets for time and memory, and the measured ratios."""
    rows = []
    for name, label in TIMED.items():
        csg = read(f'speed-{name}')['summary']['csg']
        ratios = [f'{csg[f"{key}_ratio"]:.3f}' for key in ('step', 'memory', 'evaluation')]
        rows.append((f'{label.split(",")[0]} on a CPU', *ratios[:2], '1.08', ratios[2], '1.02'))
    return markdown(('', 'step', 'memory', 'target', 'evaluation', 'target'), rows)


def result() -> str:
    """The result of ``experiments.speed``."""
    first, second = (read(f'speed-{name}')['summary']['csg'] for name in TIMED)
    step, evaluation = f'{first["step_ratio"]:.3f}', f'{first["evaluation_ratio"]:.3f}'
    others = f'{second["step_ratio"]:.3f}, {second["evaluation_ratio"]:.3f}'
    links = [link(f'speed-{name}') for name in TIMED]
    return f'{links[0]}: step {step}, evaluation {evaluation} of dense; {links[1]}: {others}'


TABLES: dict[str, Callable[[], str]] = {
    'precision': lambda: variants('precision-deeplabv3-r18', evaluation=True),
    'accumulation': lambda: variants('accumulation-deeplabv3-r18', evaluation=False),
    'speed': speed,
    'ahead': ahead,
    'speed-targets': speed_targets,
}
