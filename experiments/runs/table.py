"""A table of trainings: a YAML file that says what each cell trains."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import yaml
from mmengine.config import Config

from csg_seg.errors import CSGError
from csg_seg.mm.checkpoints.descriptions import leaves
from csg_seg.running.configs import read_config

ROOT = Path(__file__).parents[2]
OTHER_CELL = 'cell:'


@dataclass(frozen=True)
class Cell:
    """One network, trained with one seed.

    Attributes:
        name: of the cell in its table, without the seed.
        network: the dense network that it is, or is compared with.
        method: how it is made small: 'dense', 'csg', 'narrow' ...
        size: height and width of the images, as '180x240'.
        config: config file, relative to the repository.
        seed: of data order, augmentation and start values.
        csg: settings of the generators; None for a plain network.
        options: settings to override in the config, by dotted name.
        epochs: length of the training; None leaves the config's.
        amp: whether to train in bfloat16 mixed precision.

    In ``csg`` and ``options``, ``'cell:NAME'`` stands for the trained checkpoint of another cell of the same seed, and
    ``'cell:DATASET/NAME'`` for one of another data set.
    """

    name: str
    network: str
    method: str
    size: str
    config: str
    seed: int
    csg: Any = None
    options: Mapping[str, Any] = field(default_factory=dict)
    epochs: int | None = None
    amp: bool = False

    @property
    def label(self) -> str:
        """The name with the seed, which ``--only`` chooses by."""
        return f'{self.name}-s{self.seed}'

    @property
    def needs(self) -> tuple[str, ...]:
        """The labels of the cells of the same data set whose checkpoints this one starts from."""
        return tuple(label for label in self._named() if '/' not in label)

    @property
    def needs_elsewhere(self) -> tuple[str, ...]:
        """``DATASET/LABEL`` of the cells of other data sets whose checkpoints this one starts from."""
        return tuple(label for label in self._named() if '/' in label)

    def _named(self) -> list[str]:
        named = [each for _, each in leaves([self.csg, self.options]) if str(each).startswith(OTHER_CELL)]
        return [f'{each.removeprefix(OTHER_CELL)}-s{self.seed}' for each in dict.fromkeys(named)]

    def read_config(self) -> Config:
        """Return the cell's complete config, with data under ``data/``.

        Raises:
            CSGError: there is no such config, or a setting is wrong.
        """
        cfg = read_config(ROOT / self.config, self.options)
        if self.csg is not None:
            cfg.model.update(type='CSGModel', base_type=cfg.model.type, csg=self.csg)
        if self.epochs is not None:
            _set_epochs(cfg, self.epochs)
        return cfg


@dataclass(frozen=True)
class Table:
    """The cells of a data set.

    Attributes:
        path: the file.
        dataset: names the file of results.
        metric: the score, as ``tools/test.py`` prints it.
        cells: in the order in which they are trained: the first seed of all comes first.
    """

    path: Path
    dataset: str
    metric: str
    cells: tuple[Cell, ...]

    def matching(self, patterns: Sequence[str]) -> tuple[Cell, ...]:
        """Return the cells whose label or name one of several shell-style patterns matches, in the table's order.

        Raises:
            CSGError: a pattern matches none.
        """
        chosen = set()
        for pattern in patterns:
            found = {each.label for each in self.find(pattern)}
            if not found:
                names = ', '.join(dict.fromkeys(each.name for each in self.cells))
                raise CSGError(f'--only {pattern!r} matches no cell of {self.path}; the cells are {names}')
            chosen |= found
        return tuple(each for each in self.cells if each.label in chosen)

    def find(self, pattern: str) -> tuple[Cell, ...]:
        """Return the cells whose label or name a shell-style pattern matches, perhaps none."""
        return tuple(each for each in self.cells if fnmatchcase(each.label, pattern) or fnmatchcase(each.name, pattern))

    def dense_of(self, cell: Cell) -> Cell:
        """Return the dense cell of a cell's network.

        Raises:
            CSGError: the table has none.
        """
        for each in self.cells:
            if each.method == 'dense' and each.network == cell.network:
                return each
        raise CSGError(f'{self.path}: network {cell.network} of cell {cell.name} has no cell of method dense; add one')


def read_table(path: str | Path) -> Table:
    """Read a table of trainings.

    Raises:
        CSGError: the file is not a table, or a key is unknown or missing.
    """
    path = Path(path)
    try:
        content = yaml.safe_load(path.read_text())
    except FileNotFoundError:
        known = ', '.join(str(each.relative_to(ROOT)) for each in sorted((ROOT / 'experiments').rglob('tables/*.yml')))
        raise CSGError(f'{path}: no such table; there are {known}') from None
    except (yaml.YAMLError, OSError, UnicodeDecodeError) as error:
        raise CSGError(f'{path}: not a table of trainings ({" ".join(str(error).split())[:200]})') from None
    if not isinstance(content, Mapping):
        raise CSGError(f'{path}: not a table of trainings; it needs the keys dataset, metric and cells')
    _check_keys(f'{path}', content, required={'dataset', 'metric', 'cells'}, known={'defaults'})
    if not isinstance(content['cells'], list) or not content['cells']:
        raise CSGError(f'{path}: cells must be a list of cells')
    cells = [cell for entry in content['cells'] for cell in _cells(path, content.get('defaults') or {}, entry)]
    labels = [each.label for each in cells]
    for label in labels:
        if labels.count(label) > 1:
            raise CSGError(f'{path}: two cells are named {label}; rename one')
    ordered = sorted(cells, key=lambda each: each.seed)  # stable: table order within a seed
    table = Table(path, str(content['dataset']), str(content['metric']), tuple(ordered))
    for position, cell in enumerate(ordered):
        table.dense_of(cell)
        for label in cell.needs:
            if label not in [each.label for each in ordered[:position]]:
                raise CSGError(f'{path}: cell {cell.label} needs {label}, which is not above it; add it there')
    return table


def _cells(path: Path, defaults: Mapping[str, Any], entry: Any) -> Iterator[Cell]:
    if not isinstance(entry, Mapping) or 'name' not in entry:
        raise CSGError(f'{path}: every cell needs a name; got {entry!r}')
    values = {'seeds': [0], **defaults, **entry}
    own = {each.name for each in fields(Cell)} - {'seed'}
    required = {'name', 'network', 'method', 'size', 'config'}
    _check_keys(f'{path}: cell {entry["name"]}', values, required=required, known=own | {'seeds'})
    seeds = values.pop('seeds')
    if not isinstance(seeds, list) or not all(isinstance(each, int) and each >= 0 for each in seeds):
        raise CSGError(f'{path}: cell {entry["name"]}: seeds must be a list of integers from 0; got {seeds!r}')
    for seed in seeds:
        yield Cell(seed=seed, **values)


def _check_keys(where: str, content: Mapping[str, Any], *, required: set[str], known: set[str]) -> None:
    for key in sorted(required):
        if key not in content:
            raise CSGError(f'{where}: the key {key} is missing')
    for key in content:
        if key not in required | known:
            raise CSGError(f'{where}: unknown key {key!r}; known are {", ".join(sorted(required | known))}')


def _set_epochs(cfg: Config, epochs: int) -> None:
    """Train for other epochs; the schedule is stretched."""
    if cfg.train_cfg.get('max_epochs') is None:
        raise CSGError('epochs can be set for configs that train by epochs; leave it out')
    before = cfg.train_cfg.max_epochs
    for scheduler in cfg.param_scheduler:
        if scheduler.get('by_epoch', True) and scheduler.get('begin', 0) >= epochs:
            raise CSGError(f'epochs: {epochs} ends before {scheduler.type} begins; give more')
        if scheduler.get('by_epoch', True) and scheduler.get('end') == before:
            scheduler.end = epochs
            if 'T_max' in scheduler:
                scheduler.T_max += epochs - before
    cfg.train_cfg.max_epochs = epochs
    cfg.train_cfg.val_interval = epochs
