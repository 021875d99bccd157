"""Counts of parameters in the documents are those of the networks."""

import re

import pytest
import torch
from conftest import ROOT
from mmengine.config import Config

from csg_seg import summarise
from csg_seg.mm.model import build_model

RESNET20 = ROOT / 'configs' / 'cifar10' / 'csg-s12-d72_resnet20_b192-200e_cifar10.py'
HOW_IT_WORKS = (ROOT / 'docs' / 'how_it_works.md').read_text()
GENERATORS = re.findall(r'^\| (linear|mlp), `(.+?)` \| ([\d,]+) \| ([\d,]+) \|$', HOW_IT_WORKS, flags=re.MULTILINE)


def test_the_table_of_generators_is_found():
    assert [kind for kind, *_ in GENERATORS] == ['linear', 'mlp', 'linear']


@pytest.mark.parametrize(('kind', 'settings', 'stored', 'in_generator'), GENERATORS)
def test_generators_have_the_documented_size(kind, settings, stored, in_generator):
    cfg = Config.fromfile(RESNET20)
    options = {key: int(value) for key, value in re.findall(r'(\w+)=(\d+)', settings)}
    cfg.model.csg = dict(slice_shape=(12, 12, 3, 3), generator=kind, **options)
    with torch.device('meta'):
        summary = summarise(build_model(cfg))
    (generator,) = summary.generators
    assert (f'{summary.stored_params:,}', f'{generator.stored_params:,}') == (stored, in_generator)
    assert f'(dense {summary.dense_params:,})' in HOW_IT_WORKS
