"""The example of docs/your_own_generator.md: a kind of generator that the package does not know."""

import copy
import re

import pytest
import torch
from conftest import ROOT
from torch import nn

from csg_seg import CSGError, load_compact, materialise, retrofit, summarise
from csg_seg.generators.registry import KINDS

PAGE = (ROOT / 'docs' / 'your_own_generator.md').read_text()


@pytest.fixture
def example(tmp_path, monkeypatch):
    """What the page's example leaves in its names."""
    monkeypatch.chdir(tmp_path)
    (code,) = re.findall(r'```python\n(.*?)```', PAGE, flags=re.DOTALL)
    names = {}
    torch.manual_seed(0)
    exec(code, names)
    yield names
    del KINDS['low_rank']


def dense():
    return nn.Sequential(nn.Conv2d(3, 32, 3), nn.ReLU(), nn.Conv2d(32, 64, 3), nn.ReLU(), nn.Conv2d(64, 64, 3))


def test_the_example_is_fitted_stored_and_read_again(example):
    model = example['model']
    assert example['errors'].keys() == {'2', '4'} and max(example['errors'].values()) < 1
    (generator,) = summarise(model).generators
    assert (generator.generator, generator.options) == ('low_rank', {'width': 12})
    assert generator.stored_params == 12 * 16 * 16 * 9 + 16 * 12
    twin = load_compact('model.safetensors', dense())
    x = torch.randn(1, 3, 9, 9)
    assert torch.equal(twin(x), model(x))
    other = retrofit(dense(), dict(slice_shape=(16, 16, 3, 3), code_dim=16, generator='low_rank', width=12))
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(x), model(x))
    torch.testing.assert_close(materialise(copy.deepcopy(model))(x), model(x))


def test_the_examples_weights_start_at_kaiming_variance_and_all_of_it_trains(example):
    csg = dict(slice_shape=(16, 16, 3, 3), code_dim=64, generator='low_rank', width=32)
    model = retrofit(dense(), csg)
    for name in ('2', '4'):
        std = model.get_submodule(name).generate_weight().std().item()
        assert std == pytest.approx((2 / (64 * 9)) ** 0.5, rel=0.2)
    model(torch.randn(2, 3, 9, 9)).square().mean().backward()
    assert all((parameter.grad != 0).any() for parameter in model.parameters())


def test_the_examples_constraint_is_checked(example):
    csg = dict(slice_shape=(16, 16, 3, 3), code_dim=16, generator='low_rank', width=17)
    with pytest.raises(CSGError, match=r'csg\[0\]: width must be at most code_dim; got 17'):
        retrofit(dense(), csg)


def test_the_page_is_under_a_page():
    assert len(PAGE.split()) < 700
