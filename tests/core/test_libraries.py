"""Networks of torchvision and timm by one call, and the training loop of the documents."""

import re
import subprocess
import sys

import pytest
import timm
import torch
import torchvision
from conftest import ROOT

from csg_seg import load_compact, materialise, retrofit, save_compact, summarise
from csg_seg.layers.conv import CSGConv

CONV3 = dict(slice_shape=(16, 16, 3, 3), code_dim=128)
CONV1 = dict(slice_shape=(16, 16, 1, 1), code_dim=16)


def deeplabv3():
    return torchvision.models.segmentation.deeplabv3_resnet50(weights=None, weights_backbone=None, aux_loss=True)


NETWORKS = {
    # how it is built, and parameters dense and stored; ResNet's are the paper's (Omidvar et al., AISTATS 2021)
    'torchvision resnet50': (torchvision.models.resnet50, 25_557_032, 15_163_432),
    'timm resnet50': (lambda: timm.create_model('resnet50', zero_init_last=False), 25_557_032, 15_163_432),
    'torchvision deeplabv3_resnet50': (deeplabv3, None, None),
    'timm convnext_atto': (lambda: timm.create_model('convnext_atto'), None, None),
    'timm mobilenetv3_small_050': (lambda: timm.create_model('mobilenetv3_small_050'), None, None),
    'torchvision densenet121': (torchvision.models.densenet121, 7_978_856, 6_254_440),
    'torchvision mobilenet_v2': (torchvision.models.mobilenet_v2, None, None),
}
# No 3x3 conv without groups but the first.
POINTWISE = {'timm convnext_atto', 'timm mobilenetv3_small_050', 'torchvision mobilenet_v2'}


def output(model, x):
    with torch.no_grad():
        out = model(x)
    return out['out'] if isinstance(out, dict) else out


@pytest.mark.parametrize('name', NETWORKS)
def test_a_network_is_retrofitted_trained_stored_and_materialised_by_one_call_each(name, tmp_path):
    build, dense, stored = NETWORKS[name]
    torch.manual_seed(0)
    model = retrofit(build(), CONV1 if name in POINTWISE else CONV3)
    summary = summarise(model)
    assert dense is None or (summary.dense_params, summary.stored_params) == (dense, stored)
    assert summary.compression_ratio > 1
    x = torch.randn(2, 3, 64, 64)
    out = model(x)
    (out['out'] if isinstance(out, dict) else out).square().mean().backward()
    assert model.csg[0].weight.grad.abs().max() > 0
    model.eval()
    expected = output(model, x)
    save_compact(model, tmp_path / 'model.safetensors')
    assert torch.equal(output(load_compact(tmp_path / 'model.safetensors', build()).eval(), x), expected)
    keys = materialise(model).state_dict().keys()
    assert keys == build().state_dict().keys()
    assert (output(model, x) - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_two_generators_take_3x3_and_1x1():
    summary = summarise(retrofit(torchvision.models.resnet50(), [CONV3, CONV1]))
    assert [each.layers for each in summary.generators] == [16, 36]
    assert summary.compression_ratio > 5


def test_convs_that_standardise_their_weights_still_do_when_generated():
    torch.manual_seed(0)
    model = retrofit(timm.create_model('resnetv2_50x1_bit'), CONV3).eval()
    conv = model.stages[0].blocks[0].conv2
    assert isinstance(conv, CSGConv) and 'Std' in type(conv).__name__
    x = torch.randn(1, 3, 64, 64)
    before = output(model, x)
    after = output(materialise(model), x)
    assert (after - before).abs().max() <= 1e-5 * before.abs().max()


def test_the_training_program_of_the_documents_runs(tmp_path):
    blocks = re.findall(r'```python\n(.*?)```', (ROOT / 'docs' / 'plain_pytorch.md').read_text(), flags=re.DOTALL)
    (program,) = [block for block in blocks if 'for epoch in' in block]
    (after,) = [block for block in blocks if "load_compact('small.safetensors', model)" in block]
    short = program.replace("draw_dataset('data/VOCdevkit')", "draw_dataset('data/VOCdevkit', train=80, val=20)")
    done = subprocess.run(
        [sys.executable, '-c', f'import torch; torch.manual_seed(0)\n{short}\n{after}'],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    headline, *epochs = done.stdout.splitlines()
    assert headline in (ROOT / 'docs' / 'plain_pytorch.md').read_text() and len(epochs) == 3
    losses, scores = (re.findall(rf'{name} ([\d.]+)', done.stdout) for name in ('loss', 'mIoU'))
    assert float(losses[-1]) < float(losses[0]) and float(scores[-1]) > float(scores[0])
    assert (tmp_path / 'small.safetensors').stat().st_size < 800_000
