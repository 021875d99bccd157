"""Every table of trainings is read, and its cells are networks of the sizes that their names say."""

import re
import sys

import pytest
import torch
from conftest import ROOT

from csg_seg import summarise
from csg_seg.generators.registry import KINDS
from csg_seg.mm.model import build_model
from experiments.runs.table import read_table

TABLES = sorted((ROOT / 'experiments').rglob('tables/*.yml'))
SLOW = ('rivals', 'peers')
# What these networks store depends on values of weights, or their constructors read values, so they need memory.
FROM_VALUES = ('tucker', 'cp', 'pruned', 'resnet18')


@pytest.fixture(autouse=True)
def _kinds(monkeypatch):
    """Let tables register kinds of generators, in these tests only: messages of other tests list all kinds."""
    before = dict(KINDS)
    for name, module in [*sys.modules.items()]:
        if name.startswith('experiments.rivals.') and 'register_generator' in vars(module):
            monkeypatch.delitem(sys.modules, name)  # imported anew, it registers its kinds
    yield
    KINDS.clear()
    KINDS.update(before)


def test_the_tables_of_the_data_sets_are_there():
    names = {path.name for path in TABLES}
    assert names >= {'camvid.yml', 'camvid_large.yml', 'cifar10.yml', 'kvasir.yml'}


def count(cell):
    """Return the parameters that a cell's network stores."""
    cfg = cell.read_config()
    with torch.device('cpu' if {cell.method, cell.network} & {*FROM_VALUES} else 'meta'):
        return summarise(build_model(cfg)).stored_params


@pytest.mark.parametrize(
    'path',
    [pytest.param(path, marks=[pytest.mark.full] * (path.parts[-3] in SLOW), id=path.stem) for path in TABLES],
)
def test_cells_store_what_their_names_say(path):
    table = read_table(path)
    cells = {cell.name: cell for cell in reversed(table.cells)}  # one of each name
    stored = {name: count(cell) for name, cell in cells.items()}
    for name, cell in cells.items():
        ratio = stored[table.dense_of(cell).name] / stored[name]
        said = re.search(r'-([\d.]+)x(-|$)', name)
        assert ratio == pytest.approx(float(said[1]) if said else 1, rel=0.05), (name, ratio)


def test_a_name_is_one_cell_in_all_tables_of_a_data_set():
    # They share a file of results.
    cells = {}
    for table in map(read_table, TABLES):
        for cell in table.cells:
            assert cells.setdefault((table.dataset, cell.label), cell) == cell
