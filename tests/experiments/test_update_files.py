"""Bytes and scores of the variants of one base."""

import pytest
import torch
from test_runs import CSG, DENSE_CELL, SHORT, table_file

from csg_seg import load_compact
from csg_seg.errors import CSGError
from csg_seg.mm.model import build_model
from experiments.runs.table import read_table
from experiments.updates.files import measure_updates, trained_family

BASE = {'name': 'base', 'method': 'csg', 'csg': CSG}
CODES = {
    **BASE,
    'name': 'codes',
    'options': {**SHORT, 'load_from': 'cell:base', 'model.train_only': ['*.code']},
}


@pytest.fixture
def family(tmp_path, drawn):
    """Checkpoints as if the base and a variant had been trained: the variant's codes differ."""
    table = read_table(table_file(tmp_path, [DENSE_CELL, BASE, CODES]))
    (tmp_path / 'drawn').symlink_to(drawn.parent)
    for label in ('base-s0', 'codes-s0'):
        (cell,) = table.matching([label])
        torch.manual_seed(0)
        model = build_model(cell.read_config())
        if label == 'codes-s0':
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    if parameter.requires_grad:
                        parameter.add_(1e-3 if name.endswith('.code') else 0)
        folder = tmp_path / 'work' / 'drawn' / label
        folder.mkdir(parents=True)
        torch.save({'state_dict': model.state_dict()}, folder / 'iter_6.pth')
        (folder / 'last_checkpoint').write_text(str(folder / 'iter_6.pth'))
        (folder / 'test.json').write_text('{}')
    return table


@pytest.mark.full
def test_updates_are_smaller_than_their_base_and_tested_as_what_they_are(family, tmp_path):
    base, variants = trained_family(family, 'base-s0', data=tmp_path, work_dir=tmp_path / 'work')
    folder = tmp_path / 'files'
    folder.mkdir()
    whole, update = measure_updates(base, variants, ['int8'], folder)
    assert (whole['cell'], update['cell']) == ('base', 'codes')
    assert (whole['trains'], update['trains']) == (None, ['*.code'])
    assert update['bytes'] == (folder / 'int8' / 'codes-s0.safetensors').stat().st_size < whole['bytes']
    assert 0 <= update['test'] <= 100 and 'val' not in update  # the drawn images of val are those of test
    loaded = load_compact(folder / 'int8' / 'codes-s0.safetensors')
    trained = torch.load(variants[0].checkpoint())['state_dict']
    for name, value in loaded.state_dict().items():
        if name.endswith('.code'):
            torch.testing.assert_close(value, trained[name], rtol=0, atol=float(trained[name].abs().max()) / 127)


@pytest.mark.parametrize(
    ('base', 'message'),
    [
        ('bse-s0', '--base bse-s0: no cell of .*; the cells are dense-s0, base-s0, codes-s0'),
        ('dense-s0', '--base dense-s0: no cell of .* starts from it'),
    ],
)
def test_a_cell_that_is_no_base_is_refused(family, tmp_path, base, message):
    with pytest.raises(CSGError, match=message):
        trained_family(family, base, data=tmp_path, work_dir=tmp_path / 'work')


def test_a_cell_that_is_not_trained_is_refused(family, tmp_path):
    with pytest.raises(CSGError, match='base-s0 is not trained; run experiments.runs with the same --work-dir first'):
        trained_family(family, 'base-s0', data=tmp_path, work_dir=tmp_path / 'elsewhere')
