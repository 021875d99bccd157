"""Generation under autocast: in float32, or in autocast's precision."""

from contextlib import nullcontext

import pytest
import torch
from torch.nn import functional as F
from two_convs import BEYOND, batch, build, gradients

from csg_seg import fit, load_compact, materialise, save_compact
from csg_seg.errors import CSGError
from csg_seg.generators.settings import Settings

KINDS = [{}, {'generator': 'binary'}, {'layout': 'flat'}, {'freeze_generator': True}, *BEYOND]
BF16 = torch.bfloat16


def autocast():
    return torch.autocast('cpu', dtype=BF16)


@pytest.mark.parametrize('change', KINDS)
def test_weights_have_the_precision_that_is_asked_for(change):
    for precision, wanted in (('float32', torch.float32), ('autocast', BF16)):
        model = build(**change, precision=precision)
        dtypes = []
        model.widen.register_forward_hook(lambda conv, *_, seen=dtypes: seen.append(conv.weight.dtype))
        x, _ = batch()
        with autocast():
            model(x)
            model.forward(x)  # past the root's hooks: the layer makes its own weight
            with torch.no_grad():
                model.eval()(x)
        assert dtypes == [wanted] * 3
        assert model.widen.weight.dtype == torch.float32  # without autocast


@pytest.mark.parametrize('change', KINDS)
def test_gradients_lose_little_more_than_the_convs_precision_costs(change):
    x, target = batch()

    def gradient(precision, context):
        model = build(**change, precision=precision)
        with context:
            loss = F.cross_entropy(model(x), target)
        loss.backward()
        assert all(parameter.grad.dtype == torch.float32 for parameter in model.parameters() if parameter.requires_grad)
        return torch.cat([each.flatten() for each in gradients(model).values() if each is not None])

    exact = gradient('float32', nullcontext())
    errors = {precision: (gradient(precision, autocast()) - exact).norm() for precision in ('float32', 'autocast')}
    assert 0 < errors['autocast'] < 2 * errors['float32'] < 0.2 * exact.norm()


def test_weights_are_not_kept_from_one_precision_to_another():
    x, _ = batch()
    model = build(precision='autocast').eval()
    with torch.no_grad():
        wanted = model(x)
        with autocast():
            half = model(x)
        assert half.dtype == BF16
        assert torch.equal(model(x), wanted)
        with autocast():
            assert torch.equal(model(x), half)


def test_a_layer_that_leaves_autocast_gets_a_weight_in_float32():
    x, _ = batch()
    model = build(precision='autocast')
    forward = model.widen.forward

    def in_float32(images):
        with torch.autocast('cpu', enabled=False):
            return forward(images.float())

    model.widen.forward = in_float32
    with autocast():
        assert model(x).isfinite().all()


def test_files_and_plain_networks_do_not_depend_on_the_precision(tmp_path):
    models = {precision: build(precision=precision).eval() for precision in ('float32', 'autocast')}
    for precision, model in models.items():
        save_compact(model, tmp_path / f'{precision}.safetensors')
    x, _ = batch()
    with torch.no_grad():
        wanted = models['float32'](x)
        for precision, model in models.items():
            # A file of either precision is loaded into a model of the other.
            other = 'autocast' if precision == 'float32' else 'float32'
            load_compact(tmp_path / f'{precision}.safetensors', models[other])
            assert torch.equal(models[other](x), wanted)
            assert torch.equal(materialise(model)(x), wanted)


def test_the_default_precision_is_not_written_and_another_is_refused():
    settings = {'slice_shape': [16, 16, 3, 3], 'code_dim': 128}
    assert 'precision' not in Settings.from_dict(settings).to_dict()
    assert Settings.from_dict(settings).precision == 'autocast'
    exact = Settings.from_dict({**settings, 'precision': 'float32'})
    assert Settings.from_dict(exact.to_dict()) == exact and exact.precision == 'float32'
    with pytest.raises(CSGError, match="precision must be one of 'float32', 'autocast'; got 'bf16'"):
        Settings.from_dict({**settings, 'precision': 'bf16'})


def test_plain_weights_are_in_the_parameters_precision():
    for precision in ('autocast', 'float32'):
        model, twin = (build(precision=precision) for _ in range(2))
        with autocast():
            materialise(model)
        materialise(twin)
        assert torch.equal(model.widen.weight, twin.widen.weight) and model.widen.weight.dtype == torch.float32


def test_a_fit_is_the_same_under_autocast():
    model, twin = (build(residual=1, precision='autocast') for _ in range(2))
    dense = materialise(build(seed=4)).state_dict()
    with autocast():
        errors = fit(model, dense)
    assert errors == fit(twin, dense)
    assert torch.equal(model.widen.code, twin.widen.code)
