"""The generators that are compared at equal size."""

from pathlib import Path

ROOT = Path(__file__).parents[2]

# By the name of their config: the linear generator, then its rivals.
GENERATORS = {
    's4-d57': 'linear, codes of 57',
    's4-d52-mlp48': 'MLP of 48 hidden units, codes of 52',
    's4-d53-residual1': 'linear with a residual of rank 1, codes of 53',
    '3x-s4': 'three linear ones, one for each stage',
    's4-d52-ring18': 'tensor ring of rank 18, codes of 52',
    's4-d61-binary': 'random binary, codes of 61',
}


def config_name(generator: str) -> str:
    """Return the name of the config of one of :data:`GENERATORS`."""
    return f'taught-csg-{generator}_resnet20_b64-3e_cifar10-npz'


def config_paths() -> list[Path]:
    """Return the configs of all generators."""
    folders = (ROOT / 'configs' / 'cifar10', Path(__file__).parent / 'configs')
    names = [f'{config_name(generator)}.py' for generator in GENERATORS]
    return [folder / name for name in names for folder in folders if (folder / name).exists()]
