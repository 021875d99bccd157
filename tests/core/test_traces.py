"""Traces of generated networks: TorchScript, and the ONNX files that torch's TorchScript exporter makes of it."""

import io

import onnxruntime
import pytest
import torch
from torch import nn

import csg_seg
import experiments.rivals.tensor_ring  # noqa: F401 (registers a kind that is not part of the package)
from csg_seg.generators.slices import LAYOUTS
from csg_seg.layers.conv import generated_convs

pytestmark = pytest.mark.filterwarnings(
    'ignore::DeprecationWarning', 'ignore:the network stores', 'error::torch.jit.TracerWarning'
)
GENERATORS = {
    'linear': {},
    'binary': dict(generator='binary'),
    'mlp': dict(generator='mlp', hidden=6),
    'tensor_ring': dict(generator='tensor_ring', rank=2),
    'residual': dict(residual=2),
}
KINDS = {
    1: (nn.Conv1d, nn.ConvTranspose1d),
    2: (nn.Conv2d, nn.ConvTranspose2d),
    3: (nn.Conv3d, nn.ConvTranspose3d),
}


def network(n_dims=2, *, side_out=12, side_in=20, code_dim=30, **settings):
    """Build convs of odd widths, plain, transposed and grouped, that three generators feed."""
    torch.manual_seed(0)
    conv, transposed = KINDS[n_dims]
    layers = (
        conv(3, 5, 3),
        conv(5, 12, 3),
        transposed(12, 17, 3),
        conv(17, 20, 1),
        conv(20, 62, 3, groups=2),
        transposed(62, 10, 3, groups=2),
        conv(10, 7, 1),
    )
    model = nn.Sequential(*(part for layer in layers for part in (layer, nn.Tanh()))).eval()
    three, one = (3,) * n_dims, (1,) * n_dims
    first = dict(slice_shape=(side_out, side_in, *three), code_dim=code_dim, exclude=['8', '10'], **settings)
    # Slices no wider than a group: wider ones leave grouped convs dense.
    grouped = dict(slice_shape=(8, 4, *three), code_dim=code_dim, include=['8', '10'], **settings)
    pointwise = dict(slice_shape=(side_out, side_in, *one), code_dim=6, layout=settings.get('layout', 'block'))
    csg_seg.retrofit(model, [first, grouped, pointwise])
    for parameter in model.parameters():
        if not parameter.any():  # a residual's or an MLP's start, of which a graph could make nothing unseen
            nn.init.normal_(parameter, std=0.1)
    assert [name for name, _ in generated_convs(model)] == ['2', '4', '6', '8', '10', '12']
    return model


def images(n_dims=2, batch=1):
    return torch.randn(batch, 3, *[7] * n_dims, generator=torch.Generator().manual_seed(batch))


def check_onnx(model, n_dims=2, **options):
    """Compare onnxruntime with torch on the traced images, and on more and larger ones."""
    free = {0: 'batch', 2: 'height', n_dims + 1: 'width'}
    file = io.BytesIO()
    torch.onnx.export(
        model, (images(n_dims),), file, dynamo=False, input_names=['image'], dynamic_axes={'image': free}, **options
    )
    session = onnxruntime.InferenceSession(file.getvalue(), providers=['CPUExecutionProvider'])
    larger = torch.cat([images(n_dims, batch=3)] * 2, dim=-1)
    for x in (images(n_dims), larger):
        (found,) = session.run(None, {'image': x.numpy()})
        with torch.no_grad():
            wanted = model(x)
        torch.testing.assert_close(torch.from_numpy(found), wanted, rtol=1e-4, atol=1e-4 * wanted.abs().max().item())


@pytest.mark.parametrize('opset', [11, 18])
@pytest.mark.parametrize('layout', LAYOUTS)
@pytest.mark.parametrize('generator', GENERATORS)
def test_an_onnx_file_of_a_trace_computes_what_torch_does(generator, layout, opset):
    model = network(layout=layout, **GENERATORS[generator])
    check_onnx(model, opset_version=opset)


@pytest.mark.parametrize('sides', [(8, 8), (5, 3), (64, 64)], ids=str)
@pytest.mark.parametrize('fold', [True, False], ids=['folded', 'unfolded'])
def test_any_slice_shape_is_written(sides, fold):
    check_onnx(network(side_out=sides[0], side_in=sides[1]), do_constant_folding=fold)


@pytest.mark.parametrize('n_dims', [1, 3])
@pytest.mark.parametrize('generator', ['linear', 'tensor_ring'])
def test_convs_of_other_dimensions_are_written(generator, n_dims):
    settings = GENERATORS[generator]
    # A multiple of each slice shape's number of cores.
    check_onnx(network(n_dims, code_dim=140 if n_dims == 3 else 20, **settings), n_dims)


@pytest.mark.parametrize('n_dims', KINDS)
@pytest.mark.parametrize('layout', LAYOUTS)
def test_a_saved_trace_computes_what_torch_does(layout, n_dims, tmp_path):
    model = network(n_dims, layout=layout)
    torch.jit.save(torch.jit.trace(model, images(n_dims)), tmp_path / 'trace.pt')
    loaded = torch.jit.load(tmp_path / 'trace.pt')
    x = images(n_dims, batch=3)
    with torch.no_grad():
        torch.testing.assert_close(loaded(x), model(x))
