import copy

import pytest
import torch
from torch import nn

import experiments.rivals.tensor_ring  # noqa: F401 (registers a kind that is not part of the package)
from csg_seg import load_compact, materialise, retrofit, save_compact, summarise
from csg_seg.errors import CSGError
from csg_seg.generators.lengths import row_length
from csg_seg.generators.slices import join
from csg_seg.layers.conv import generated_convs

CSG = {'slice_shape': (12, 20, 3, 3), 'code_dim': 24}
KINDS = {
    'linear': {},
    'binary': {'generator': 'binary'},
    'mlp': {'generator': 'mlp', 'hidden': 5},
    'tensor ring': {'generator': 'tensor_ring', 'rank': 3},
}


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Conv2d(3, 31, 3)
        self.narrow = nn.Conv2d(31, 17, 3, bias=False)
        self.widen = nn.Conv2d(17, 31, 3)

    def forward(self, x):
        return self.widen(self.narrow(self.stem(x)))


def build(**changes):
    return retrofit(Net(), CSG | changes)


def trained(model):
    """Return the model with a residual that has left zero."""
    rng = torch.Generator().manual_seed(3)
    for _, conv in generated_convs(model):
        conv.residual_out.data.normal_(generator=rng)
    return model


@pytest.mark.parametrize('kind', KINDS.values(), ids=KINDS)
def test_it_starts_without_an_effect(kind):
    with_residual, without = build(residual=3, **kind), build(**kind)
    for name in ('narrow', 'widen'):
        one, other = with_residual.get_submodule(name), without.get_submodule(name)
        assert torch.equal(one.code, other.code)
        assert torch.equal(one.generate_weight(), other.generate_weight())


@pytest.mark.parametrize('layout', ['block', 'flat'])
@pytest.mark.parametrize('kind', KINDS.values(), ids=KINDS)
def test_a_weight_is_generated_plus_a_product_of_low_rank(kind, layout):
    conv = trained(build(residual=3, layout=layout, **kind)).narrow
    generated = join(conv.generator(conv.code), (17, 31, 3, 3), layout=layout)
    added = (conv.generate_weight() - generated).detach()
    for o, i, y, x in [(0, 0, 0, 0), (16, 30, 2, 2), (5, 7, 1, 2)]:
        slowly = sum(conv.residual_out[o, r] * conv.residual_in[r, (i * 3 + y) * 3 + x] for r in range(3))
        torch.testing.assert_close(added[o, i, y, x], slowly.detach(), rtol=1e-4, atol=1e-4)
    assert torch.linalg.matrix_rank(added.flatten(1).double(), rtol=1e-4) == 3


def test_its_rows_start_at_the_generators_length():
    conv = build(residual=8).narrow
    lengths = conv.residual_in.detach().norm(dim=1)
    assert lengths.mean().item() == pytest.approx(row_length(conv.generator.settings), rel=0.1)


@pytest.mark.parametrize('kind', KINDS.values(), ids=KINDS)
def test_gradients_reach_it_at_once(kind):
    model = build(residual=2, **kind)
    model(torch.randn(2, 3, 9, 9, generator=torch.Generator().manual_seed(0))).square().mean().backward()
    assert all((conv.residual_out.grad != 0).all() for _, conv in generated_convs(model))


@pytest.mark.parametrize('kind', KINDS.values(), ids=KINDS)
def test_it_is_counted_layer_by_layer(kind):
    models = build(residual=3, **kind), build(**kind)
    with_residual, without = map(summarise, models)
    added = {
        one.name: one.stored_params - other.stored_params
        for one, other in zip(with_residual.layers, without.layers, strict=True)
    }
    assert added == {'stem': 0, 'narrow': 3 * (17 + 31 * 9), 'widen': 3 * (31 + 17 * 9)}
    assert with_residual.stored_params - without.stored_params == sum(added.values())
    # The settings of a residual take some bytes of the generator's state too.
    with_settings, settings = (model.state_dict()['csg.0._extra_state'].nbytes for model in models)
    added_bytes = with_residual.stored_bytes - without.stored_bytes
    assert added_bytes == 4 * sum(added.values()) + with_settings - settings
    assert with_residual.dense_params == without.dense_params
    assert with_residual.dense_bytes == without.dense_bytes


def test_a_layer_that_its_residual_makes_costly_stays_dense():
    # 4 slices of 24 and a rank's 17 + 279 values against 4,743 dense: 15 ranks are 4,536, 16 are 4,832.
    assert set(dict(generated_convs(build(residual=15)))) == {'narrow', 'widen'}
    reasons = {layer.name: layer.left_dense for layer in summarise(build(residual=16)).layers}
    assert reasons['narrow'] == 'costs more generated: 4,832 against 4,743'


@pytest.mark.parametrize('kind', KINDS.values(), ids=KINDS)
@torch.no_grad()  # in evaluation: products of another size, as those of a step, may round otherwise
def test_materialising_and_loading_leave_outputs_unchanged(tmp_path, kind):
    with torch.enable_grad():
        model = trained(build(residual=2, **kind))
    x = torch.randn(2, 3, 9, 9, generator=torch.Generator().manual_seed(0))
    wanted = model(x)
    assert torch.equal(copy.deepcopy(model)(x), wanted)
    save_compact(model, tmp_path / 'model')
    assert torch.equal(load_compact(tmp_path / 'model', Net())(x), wanted)
    assert torch.equal(load_compact(tmp_path / 'model', build(residual=2, **kind | {'seed': 4}))(x), wanted)
    assert torch.equal(materialise(model)(x), wanted)
    assert list(model.state_dict()) == list(Net().state_dict())
    assert not hasattr(model.narrow, 'residual_out')


@pytest.mark.parametrize('strict', [True, False])
@pytest.mark.parametrize('residuals', [(0, 2), (2, 0), (2, 3)])
def test_another_residual_is_refused(tmp_path, residuals, strict):
    stored, wanted = (build(residual=residual) for residual in residuals)
    says = f'made with residual={residuals[0]}, this model has residual={residuals[1]}'
    with pytest.raises(CSGError, match=says):
        wanted.load_state_dict(stored.state_dict(), strict=strict)
    save_compact(stored, tmp_path / 'model')
    with pytest.raises(CSGError, match=r'made with residual \[.\], the model has \[.\]'):
        load_compact(tmp_path / 'model', wanted)


@pytest.mark.parametrize('strict', [True, False])
@pytest.mark.parametrize('lost', ['narrow.residual_out', 'widen.residual_in'])
def test_a_state_dict_without_a_factor_is_refused(lost, strict):
    state = {name: tensor for name, tensor in build(residual=2).state_dict().items() if name != lost}
    with pytest.raises(CSGError, match=f'lacks {lost}.*take another checkpoint'):
        build(residual=2).load_state_dict(state, strict=strict)


def test_a_half_precision_layer_has_a_half_precision_residual():
    model = retrofit(Net().half(), CSG | {'residual': 2})
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float16}


def test_a_layer_knows_its_own_residual_only():
    model = retrofit(Net(), [CSG | {'include': ['narrow'], 'residual': 2}, CSG])
    assert set(model.narrow.stored()) == {'code', 'residual_out', 'residual_in'}
    assert set(model.widen.stored()) == {'code'}
