"""Networks that keep no weights compute what others compute, and hold one generated weight at a time."""

import pickle
from copy import deepcopy

import pytest
import torch
from torch import nn

from csg_seg import CSGError, load_compact, materialise, retrofit, save_compact
from csg_seg.layers.conv import LARGE
from csg_seg.storage.builders import BUILDERS, register_builder

SLICE = (16, 16, 3, 3)
KINDS = {
    'linear': {},
    'flat': {'layout': 'flat'},
    'binary': {'generator': 'binary'},
    'mlp': {'generator': 'mlp', 'hidden': 7},
    'residual': {'residual': 2},
    'overhang': {'slice_shape': (48, 40, 3, 3)},
}


def build(**csg):
    """One conv is larger than LARGE, one is transposed, one is small."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 330, 3, padding=1), nn.Conv2d(330, 360, 3, padding=1), nn.ConvTranspose2d(360, 330, 3)]
    model = nn.Sequential(*layers, nn.Conv2d(330, 20, 3))
    assert model[1].weight.numel() > LARGE > model[3].weight.numel()
    return retrofit(model, {'slice_shape': SLICE, 'code_dim': 16, **csg}).eval()


def image():
    return torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def outputs(model):
    return model(image())


@pytest.mark.parametrize('kind', KINDS)
def test_outputs_are_those_of_kept_weights(kind):
    model = build(**KINDS[kind])
    kept = outputs(model)
    model.csg.keep_weights = False
    torch.testing.assert_close(outputs(model), kept, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(outputs(materialise(model)), kept, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize('kind', KINDS)
def test_rows_make_the_weight_of_one_product(kind):
    conv = build(**KINDS[kind])[1]
    whole = conv.generate_weight()
    with torch.no_grad():
        by_rows = conv.generate_weight()
    torch.testing.assert_close(by_rows, whole, rtol=1e-5, atol=1e-6)
    assert by_rows.is_contiguous()


def test_memory_format_and_autocast_are_those_of_kept_weights():
    model = build(precision='autocast').to(memory_format=torch.channels_last)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        kept = outputs(model)
        model.csg.keep_weights = False
        torch.testing.assert_close(outputs(model), kept)
        with torch.no_grad():
            weight = model[1].weight
    assert weight.dtype == torch.bfloat16 and weight.is_contiguous(memory_format=torch.channels_last)


def peak_bytes(function):
    """Return the most bytes that torch held at the same time beyond those held before."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        function()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == '[memory]']
    now = most = 0
    for event in sorted(events, key=lambda each: each.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    assert most > 0
    return most


def test_memory_holds_one_weight_at_a_time():
    model = build()
    weights = [conv.weight_shape.numel() * 4 for conv in model.csg.layers.values()]
    largest, others = max(weights), sum(weights) - max(weights)
    assert peak_bytes(lambda: outputs(model)) > largest + others
    model = build()
    model.csg.keep_weights = False
    # The conv's library copies the weight that it computes with into its own order.
    assert peak_bytes(lambda: outputs(model)) < 2.2 * largest
    with torch.no_grad():
        assert largest < peak_bytes(lambda: model[1].weight) < 1.2 * largest


def test_weights_that_were_kept_are_freed_and_training_stays_as_it_is():
    model = build()
    outputs(model)
    assert model.csg.ahead.cached
    model.csg.keep_weights = False
    outputs(model)
    assert not model.csg.ahead.cached
    twin = build().train()
    for each in (model.train(), twin):
        each(image()).square().mean().backward()
    for one, other in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(one.grad, other.grad)


def test_copies_keep_the_choice():
    model = build()
    model.csg.keep_weights = False
    for copy in (deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert not copy.csg.keep_weights


def test_a_choice_that_is_not_a_bool_is_refused():
    model = build()
    with pytest.raises(CSGError, match="keep_weights must be True or False; got 'no'"):
        model.csg.keep_weights = 'no'


@pytest.mark.parametrize('keep_weights', [True, False])
def test_a_compact_file_is_loaded_with_the_choice(keep_weights, tmp_path):
    save_compact(build(), tmp_path / 'x.safetensors')
    loaded = load_compact(tmp_path / 'x.safetensors', dense_network(), keep_weights=keep_weights).eval()
    assert loaded.csg.keep_weights == keep_weights
    torch.testing.assert_close(outputs(loaded), outputs(build()), rtol=1e-5, atol=1e-6)


def dense_network():
    model = nn.Sequential(nn.Conv2d(3, 330, 3, padding=1), nn.Conv2d(330, 360, 3, padding=1))
    return model.append(nn.ConvTranspose2d(360, 330, 3)).append(nn.Conv2d(330, 20, 3))


def add_table(model):
    """A buffer that files lack, as normalisation constants of mmengine."""
    model.register_buffer('table', torch.arange(5.0), persistent=False)


def add_plain_tensor(model):
    model.scale = torch.full((3,), 2.0)


def add_second_place(model):
    """A parameter that the module also uses outside its parameters."""
    model.again = [model[0].bias]


def add_reading(model):
    model.mean = model[0].weight.mean().item()


EXTRAS = {'nothing': (lambda model: None, 1), 'buffer': (add_table, 1), 'tensor': (add_plain_tensor, 1)}
EXTRAS |= {'second place': (add_second_place, 2), 'value': (add_reading, 2)}


@pytest.mark.parametrize('extra', EXTRAS)
def test_dense_weights_are_not_allocated_unless_they_are_used_otherwise(extra, tmp_path):
    add, times = EXTRAS[extra]
    devices = []

    @register_builder('own low memory')
    def build_own():
        model = dense_network()
        devices.append(model[0].weight.device.type)
        add(model)
        return model

    try:
        model = build()
        add(model)
        save_compact(model, tmp_path / 'x.safetensors', source={'builder': 'own low memory'})
        devices.clear()
        loaded = load_compact(tmp_path / 'x.safetensors')
    finally:
        del BUILDERS['own low memory']
    assert devices == ['meta', 'cpu'][:times]
    assert all(not each.is_meta and each.is_contiguous() for each in loaded.state_dict().values())
    assert all(each.requires_grad and type(each) is nn.Parameter for each in loaded.parameters())
    torch.testing.assert_close(outputs(loaded.eval()), outputs(model))
    for name in ('table', 'scale'):
        if hasattr(model, name):
            assert torch.equal(getattr(loaded, name), getattr(model, name))
    assert not hasattr(model, 'again') or loaded.again[0] is loaded[0].bias
    assert nn.Conv2d(3, 3, 3).weight.device.type == 'cpu'  # building elsewhere is as before


def test_a_loaded_network_does_not_depend_on_its_file(tmp_path):
    path = tmp_path / 'x.safetensors'
    save_compact(build(), path)
    with torch.device('meta'):
        model = dense_network()
    loaded = load_compact(path, model).eval()
    before = outputs(loaded)
    with path.open('r+b') as file:
        file.write(bytes(path.stat().st_size))
    assert torch.equal(outputs(loaded), before)


def test_a_choice_that_was_made_stays(tmp_path):
    path = tmp_path / 'x.safetensors'
    save_compact(build(), path)
    model = build()
    model.csg.keep_weights = False
    assert not load_compact(path, model).csg.keep_weights
    assert load_compact(path, model, keep_weights=True).csg.keep_weights
