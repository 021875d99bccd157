"""A running variance of +inf, which half precision overflows to, is read wherever weights are."""

import math

import pytest
import torch
from torch import nn

import csg_seg
from csg_seg.errors import CSGError
from csg_seg.mm.checkpoints.reading import load_weights
from csg_seg.storage.precision import DTYPES

CSG = dict(slice_shape=(6, 5, 3, 3), code_dim=12)


class Classifier(nn.Sequential):
    def __init__(self):
        torch.manual_seed(0)
        super().__init__(
            nn.Conv2d(3, 17, 3),
            nn.BatchNorm2d(17),
            nn.Conv2d(17, 31, 3),
            nn.SyncBatchNorm(31),
            nn.Flatten(),
            nn.Linear(31, 4),
        )
        nn.init.normal_(self[1].bias)
        self.eval()


def retrofitted():
    return csg_seg.retrofit(Classifier(), CSG)


def images():
    return torch.randn(2, 3, 5, 5, generator=torch.Generator().manual_seed(1))


def with_value(model, name, value):
    """Return a copy of the model's state in which one value is another."""
    state = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    state[name].view(-1)[0] = value
    return state


def overflown(model):
    """Return the model's state in half precision, two of whose variances are too large for it."""
    state = with_value(model, '1.running_var', 1e5)
    state['3.running_var'][7] = 1e5
    state = {name: tensor.half() if tensor.is_floating_point() else tensor for name, tensor in state.items()}
    assert state['1.running_var'][0] == state['3.running_var'][7] == math.inf
    return state


def check_infinite_channels(model):
    """Check that the channels of an infinite variance are their biases, and all scores finite."""
    assert model[1].running_var[0] == model[3].running_var[7] == math.inf
    assert model[1].running_var[1:].isfinite().all()
    normed = model[1](torch.randn(2, 17, 3, 3))
    assert torch.equal(normed[:, 0], model[1].bias[0].expand(2, 3, 3))
    assert model(images()).isfinite().all()


# Each loads a state dict of a dense network, or of a retrofitted one, as somewhere in the project.
DOORS = {
    'load_state_dict, dense': (Classifier, retrofitted, lambda model, state: model.load_state_dict(state)),
    'load_state_dict, generated': (retrofitted, retrofitted, lambda model, state: model.load_state_dict(state)),
    'fit': (Classifier, retrofitted, csg_seg.fit),
    'load_weights, dense': (Classifier, Classifier, load_weights),
    'load_weights, generated': (retrofitted, retrofitted, load_weights),
}
REFUSING = [door for door in DOORS if door != 'load_state_dict, generated']  # strict about names, not about values


@pytest.mark.parametrize('door', DOORS)
def test_an_infinite_variance_is_read(door):
    build_source, build_target, load = DOORS[door]
    target = build_target()
    load(target, overflown(build_source()))
    check_infinite_channels(target.eval())


@pytest.mark.parametrize('door', REFUSING)
def test_nothing_else_that_is_not_finite_is_read(door):
    build_source, build_target, load = DOORS[door]
    source = build_source()
    values = {
        name: (math.nan, math.inf, -math.inf) for name, each in source.state_dict().items() if each.is_floating_point()
    }
    values |= dict.fromkeys(('1.running_var', '3.running_var'), (math.nan, -math.inf))
    for name, refused in values.items():
        for value in refused:
            with pytest.raises(CSGError, match=f'{name} holds NaN or infinite values; take a checkpoint from before'):
                load(build_target(), with_value(source, name, value))


@pytest.mark.parametrize('door', REFUSING)
def test_nan_beside_an_infinite_variance_is_refused(door):
    build_source, build_target, load = DOORS[door]
    state = overflown(build_source())
    state['1.running_var'][3] = math.nan
    with pytest.raises(CSGError, match='1.running_var holds NaN'):
        load(build_target(), state)


@pytest.mark.parametrize('dtype', DTYPES)
def test_a_compact_file_keeps_an_infinite_variance(dtype, tmp_path):
    model = retrofitted()
    model.load_state_dict(overflown(model))
    csg_seg.save_compact(model, tmp_path / 'x.safetensors', dtype=dtype)
    for target in (Classifier(), retrofitted()):
        loaded = csg_seg.load_compact(tmp_path / 'x.safetensors', target).eval()
        check_infinite_channels(loaded)
        torch.testing.assert_close(loaded(images()), model(images()), rtol=0, atol=0.1 if dtype != 'float32' else 0.0)
    plain = csg_seg.materialise(loaded)
    check_infinite_channels(plain)


def test_a_network_of_an_infinite_variance_trains_on():
    model = retrofitted()
    load_weights(model, with_value(model, '1.running_var', math.inf))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    model[1].train()  # alone, because SyncBatchNorm trains on GPUs only
    model(images()).square().sum().backward()
    optimizer.step()
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    load_weights(retrofitted(), model.state_dict())
    assert model[1].running_var[0] == math.inf
    assert model.eval()(images()).isfinite().all()
