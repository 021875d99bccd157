"""The check of a library: a generator for each kernel size; train, store, materialise and load."""

import json
import multiprocessing
import time
from types import SimpleNamespace

import pytest
import timm
import torch
import torchvision
from conftest import run_experiment
from torch import nn

from csg_seg import retrofit
from csg_seg.errors import CSGError
from csg_seg.layers.bank import find_bank
from csg_seg.retrofitting.selection import Cause
from csg_seg.storage.builders import BUILDERS
from experiments.zoo.libraries import SCOPES, check_all, list_networks
from experiments.zoo.network import check_network, settings_for
from experiments.zoo.rows import summarise_rows
from experiments.zoo.sources import MONAI, list_sources


@pytest.mark.parametrize(
    ('scope', 'name', 'generated'),
    [
        ('torchvision', 'squeezenet1_0', 25),  # 8 modules of 3, and the classifier
        ('torchvision', 'mobilenet_v3_small', 51),  # 1x1, and depthwise 3x3 and 5x5
        ('timm', 'resnext26ts', None),
    ],
)
def test_a_network_passes_with_every_conv_but_its_first_generated(scope, name, generated):
    row = check_network(scope, name)
    assert (row['result'], row['reason']) == ('pass', '')
    assert generated is None or row['generated'] == generated
    assert sum(row['left_dense'].values()) == 1
    assert row['ratio'] > 1


def test_there_is_a_dict_for_each_kernel_and_width_of_narrow_groups():
    model = torchvision.models.mobilenet_v3_small()
    widths_and_kernels = [each['slice_shape'][1:] for each in settings_for(model)]
    assert sorted(widths_and_kernels) == [(1, 3, 3), (1, 5, 5), (8, 1, 1)]
    retrofit(model, settings_for(model))
    assert {each.cause for each in find_bank(model).left_dense.values()} == {Cause.FIRST}


def test_a_network_that_does_not_run_dense_or_has_no_conv_says_so():
    assert check_network('timm', 'no_such_network')['result'] == 'not run dense'
    row = check_network('timm', 'vit_tiny_patch16_224')
    assert (row['result'], row['reason']) == (
        'no conv',
        'it has no conv that could be generated and would cost less so',
    )


def test_a_network_whose_gradients_are_not_finite_fails(monkeypatch):
    def build(*_, **__):
        model = torchvision.models.squeezenet1_0()
        model.register_forward_hook(lambda module, _, output: output * torch.nan if module.training else output)
        return model

    monkeypatch.setattr(timm, 'create_model', build)
    row = check_network('timm', 'broken')
    assert row['result'] == 'fail' and 'gets no finite gradient' in row['reason']


SOME = {
    'torchvision': (
        'alexnet densenet121 deeplabv3_mobilenet_v3_large googlenet mnasnet0_5 raft_small shufflenet_v2_x0_5 '
        'ssdlite320_mobilenet_v3_large'
    ),
    'timm': (
        'convnext_atto dla46_c edgenext_xx_small ese_vovnet19b_slim_dw fastvit_t8 ghostnet_050 inception_next_atto '
        'lambda_resnet26t levit_128s mixnet_s mobilenetv4_conv_small_035 nf_regnet_b0 regnetx_002 repvgg_a0 skresnet18 '
        'starnet_s1 tf_efficientnet_b0 xcit_nano_12_p16_224'
    ),
    'mmseg': (
        'cgnet_fcn_4xb4-60k_cityscapes-680x680 erfnet_fcn_4xb4-160k_cityscapes-512x1024 '
        'fast_scnn_8xb4-160k_cityscapes-512x1024 pidnet-s_2xb6-120k_1024x1024-cityscapes'
    ),
    'mmpretrain': 'efficientformer-l1_8xb128_in1k shufflenet-v2-1x_16xb64_in1k van-tiny_8xb128_in1k',
    'smp': 'unet?resnet18 fpn?vgg11_bn segformer?mobilenet_v2',
    'monai': 'UNet?1D DynUNet?2D SegResNet?3D MILModel',
    'transformers': 'MobileViTForSemanticSegmentation EomtForUniversalSegmentation ResNetForImageClassification',
}


@pytest.mark.parametrize(('scope', 'name'), [(scope, name) for scope, names in SOME.items() for name in names.split()])
def test_networks_of_many_families_pass(scope, name):
    pytest.importorskip(SCOPES[scope], reason=f'{SCOPES[scope]} is not installed')
    (spec,) = list_networks(scope, [name]).values()
    row = check_network(scope, spec)
    assert (row['result'], row['reason']) == ('pass', '')
    assert row['generated'] > 0


def test_rows_are_counted_by_result_and_reason():
    passed = {'result': 'pass', 'trains_on': 'losses', 'generated': 3, 'ratio': 2.0, 'left_dense': {'first': 1}}
    better = passed | {'trains_on': 'outputs', 'ratio': 5.0, 'left_dense': {'first': 1, 'dear': 2}}
    summary = summarise_rows([passed, better, {'result': 'no conv'}, passed | {'ratio': 3.0}])
    assert {result: count for result, count in summary['results'].items() if count} == {'pass': 3, 'no conv': 1}
    assert (summary['on_losses'], summary['generated'], summary['ratio']) == (2, 9, (2.0, 3.0, 5.0))
    assert summary['left_dense'] == {'first': 3, 'dear': 2}
    assert summarise_rows([])['ratio'] == ()


def test_configs_of_one_network_are_checked_once():
    # 21 and 59 classes, and two crops.
    names = ['fcn_r50-d8_4xb4-20k_voc12aug-512x512', 'fcn_r50-d8_4xb4-40k_pascal-context-59-480x480']
    assert list(list_networks('mmseg', names)) == names[:1]
    others = ['fcn_r101-d8_4xb4-20k_voc12aug-512x512', names[0]]
    networks = list_networks('mmseg', others)
    assert sorted(networks) == sorted(others)
    assert not any('pretrained' in str(model) for model in networks.values())


def small_network(dimensions, library):
    """A network on images of some dimensions, of a class that a library seems to define."""
    conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dimensions - 1]

    class Small(nn.Module):
        def __init__(self):
            super().__init__()
            self.convs = nn.Sequential(conv(1, 16, 3), *(conv(16, 16, 3) for _ in range(8)))

        def forward(self, images, labels=None):
            logits = self.convs(images).flatten(2).mean(2)
            loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
            return SimpleNamespace(loss=loss) if library == 'transformers' and labels is not None else logits

    Small.__module__ = f'{library}.small'
    return Small()


@pytest.mark.parametrize(
    ('library', 'dimensions', 'trains_on'),
    [('monai', 1, 'outputs'), ('monai', 3, 'outputs'), ('transformers', 2, 'losses')],
)
def test_a_network_of_a_source_passes_on_images_of_its_dimensions(library, dimensions, trains_on, monkeypatch):
    monkeypatch.setitem(BUILDERS, 'small', lambda **arguments: small_network(**arguments))
    row = check_network(library, dict(builder='small', library=library, dimensions=dimensions))
    assert (row['result'], row['reason'], row['trains_on'], row['generated']) == ('pass', '', trains_on, 8)


def test_a_file_that_builds_another_network_fails(monkeypatch):
    kernels = iter((3, 3, 3, 5))  # one for each time that the check builds the network; the last is for its file
    monkeypatch.setitem(
        BUILDERS, 'other', lambda: nn.Sequential(nn.Conv2d(3, 32, 3), nn.Conv2d(32, 32, next(kernels)), nn.Flatten())
    )
    row = check_network('smp', dict(builder='other'))
    assert row['result'] == 'fail' and 'CSGError' in row['reason']


def test_each_dimension_of_a_network_is_a_source():
    sources = list_sources('monai')
    assert len(sources) == sum(len(dimensions) or 1 for dimensions, _ in MONAI.values())
    assert sources['UNet 1D'] == dict(builder='monai', name='UNet', spatial_dims=1) | MONAI['UNet'][1]
    assert 'spatial_dims' not in sources['DAF3D']


def test_a_missing_library_is_one_line(monkeypatch):
    monkeypatch.setattr('experiments.zoo.libraries.find_spec', lambda name: None)
    with pytest.raises(
        CSGError, match='segmentation_models_pytorch is not installed; docs/supported.md has the command'
    ):
        list_networks('smp')


def test_no_scope_is_made_up():
    with pytest.raises(CSGError, match="there is no scope 'keras'; choose from mmseg"):
        list_networks('keras')


def test_what_waits_does_not_begin_once_a_check_is_given_up():
    networks = {'first': 'squeezenet1_1'} | {f'video {count}': 'mvit_v1_b' for count in range(20)}
    rows = check_all('torchvision', networks)
    assert next(rows)['result'] == 'pass'
    start = time.perf_counter()
    rows.close()
    assert time.perf_counter() - start < 30  # each of the others takes longer
    assert not multiprocessing.active_children()


def test_a_check_without_workers_or_time_is_refused():
    for wrong in ({'jobs': 0}, {'seconds': 0.0}):
        with pytest.raises(CSGError, match='at least one job, and more than 0 seconds'):
            next(check_all('torchvision', {'alexnet': 'alexnet'}, **wrong))


def test_the_tool_goes_on_where_it_stopped(tmp_path):
    out = tmp_path / 'rows.jsonl'
    first = {'scope': 'torchvision', 'name': 'squeezenet1_0', 'result': 'no conv', 'reason': 'so far', 'seconds': 1.0}
    out.write_text(json.dumps(first))  # ended before the line did
    arguments = ['--scope', 'torchvision', '--names', 'squeezenet1_*', '--out', out, '--json']
    refused = run_experiment('zoo', *arguments, check=False)
    assert refused.returncode == 1 and 'exists; choose another --out, or give --resume' in refused.stderr
    rows = json.loads(run_experiment('zoo', *arguments, '--resume').stdout)
    assert rows[0] == first and [row['name'] for row in rows] == ['squeezenet1_0', 'squeezenet1_1']
    assert rows[1]['result'] == 'pass'
    assert [json.loads(line) for line in out.read_text().splitlines()] == rows
    out.write_text(out.read_text() + '{"scope": "torchvi')
    cut = run_experiment('zoo', *arguments, '--resume', check=False)
    assert cut.returncode == 1 and 'line 3 is not a row of such a check; delete the line' in cut.stderr
    other = run_experiment('zoo', *arguments, '--scope', 'timm', '--names', 'vgg11', '--resume', check=False)
    assert 'line 1 is of torchvision; choose another file for timm' in other.stderr
    nothing = run_experiment('zoo', *arguments, '--names', 'alexnot', '--resume', check=False)
    assert 'no network of torchvision is named' in nothing.stderr
