"""Convs of every kind that torch has: of one to three dimensions, grouped, transposed."""

import copy
import io

import pytest
import torch
from torch import nn

from csg_seg import fit, load_compact, materialise, retrofit, save_compact, summarise
from csg_seg.layers.bank import find_bank
from csg_seg.layers.conv import CSGConv, generated_convs, kaiming_std

# What stands behind a first conv of 3 to 30 channels, and the slices that make it; channels and kernels are odd.
KINDS = {
    'one dimension': (nn.Conv1d(30, 34, 5, padding=2), (12, 20, 5)),
    'two, oblong': (nn.Conv2d(30, 34, (1, 7), padding=(0, 3)), (12, 20, 1, 7)),
    'three dimensions': (nn.Conv3d(30, 34, 3, stride=2), (12, 20, 3, 3, 3)),
    'grouped': (nn.Conv2d(30, 34, 3, groups=2), (12, 10, 3, 3)),
    'depthwise': (nn.Conv2d(30, 60, 3, groups=30), (12, 1, 3, 3)),
    'transposed, one': (nn.ConvTranspose1d(30, 34, 4, stride=2), (12, 20, 4)),
    'transposed, two': (nn.ConvTranspose2d(30, 34, 2, stride=2, bias=False), (12, 20, 2, 2)),
    'transposed, three': (nn.ConvTranspose3d(30, 17, 3, output_padding=1, stride=2), (12, 20, 3, 3, 3)),
    'transposed and grouped': (nn.ConvTranspose2d(30, 34, 3, groups=2, dilation=2), (12, 10, 3, 3)),
    'lazy, once it has seen a batch': (nn.LazyConv2d(34, 3), (12, 20, 3, 3)),
}


def dense(kind: str) -> nn.Module:
    """A first conv and the one in question."""
    torch.manual_seed(0)
    conv = copy.deepcopy(KINDS[kind][0])
    first = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[len(conv.kernel_size)](3, 30, 1)
    model = nn.Sequential(first, conv)
    with torch.no_grad():
        model(images(model))
    conv.reset_parameters()
    return model


def images(model: nn.Module) -> torch.Tensor:
    shape = (2, 3, *[9] * len(model[0].kernel_size))
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def csg(kind: str) -> dict:
    return {'slice_shape': KINDS[kind][1], 'code_dim': 5}


@pytest.mark.parametrize('kind', KINDS)
def test_a_conv_computes_with_its_generated_weight_and_trains(kind):
    model, twin = dense(kind), dense(kind)
    kept = type(model[1])
    retrofit(model, csg(kind))
    conv, x = model[1], images(model)
    assert isinstance(conv, CSGConv) and isinstance(conv, kept) and conv.weight_shape == twin[1].weight.shape
    twin.load_state_dict({**twin.state_dict(), '1.weight': conv.generate_weight(), '0.weight': model[0].weight})
    assert torch.equal(model(x), twin(x))
    model(x).square().mean().backward()
    for parameter in (conv.code, find_bank(model)[0].weight):
        assert parameter.grad.isfinite().all() and parameter.grad.abs().sum() > 0
    summary = summarise(model)
    assert summary.dense_params == sum(parameter.numel() for parameter in twin.parameters())
    (layer,) = [each for each in summary.layers if each.generator is not None]
    assert layer.stored_params == conv.code.numel() < layer.dense_params == twin[1].weight.numel()


@pytest.mark.parametrize('kind', KINDS)
def test_a_conv_is_stored_copied_and_materialised(kind, tmp_path):
    model = retrofit(dense(kind), csg(kind))
    x = images(model)
    expected = model(x)
    save_compact(model, tmp_path / 'small.safetensors', dtype='float32')
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for twin in (
        copy.deepcopy(model),
        torch.load(file, weights_only=False),
        load_compact(tmp_path / 'small.safetensors', dense(kind)),
    ):
        assert torch.equal(twin(x), expected)
        assert twin[1].generator is find_bank(twin)[0] and type(twin[1]) is type(model[1])
    plain = materialise(model)
    assert type(plain[1]) is type(dense(kind)[1])
    assert list(plain.state_dict()) == list(dense(kind).state_dict())
    assert torch.equal(plain(x), expected)


@pytest.mark.parametrize('kind', KINDS)
def test_a_generated_weight_starts_at_kaiming_variance(kind):
    squares = []
    for seed in range(20):
        model = retrofit(dense(kind), csg(kind) | {'seed': seed})
        squares += [conv.generate_weight().square().mean() for _, conv in generated_convs(model)]
    assert torch.stack(squares).mean().sqrt().item() == pytest.approx(kaiming_std(model[1]), rel=0.1)


@pytest.mark.parametrize('kind', KINDS)
def test_weights_that_a_generator_made_are_fitted(kind):
    made = materialise(retrofit(dense(kind), csg(kind) | {'seed': 7})).state_dict()
    (error,) = fit(retrofit(dense(kind), csg(kind)), made).values()
    assert error < 0.02
