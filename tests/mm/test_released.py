"""Files that others released are read exactly: against an oracle, real ones and ones made here in the same form."""

import json
import math

import numpy as np
import pytest
import torch
import torchvision
from conftest import ROOT, run_tool
from mmengine.config import Config
from released_oracle import evaluate

from csg_seg import summarise
from csg_seg.deploy.conversion import convert_released
from csg_seg.errors import CSGError
from csg_seg.mm.checkpoints.reading import load_weights
from csg_seg.mm.checkpoints.unpickling import read_tensors
from csg_seg.mm.model import build_model
from csg_seg.storage.released import read_released

LIKE = ROOT / 'configs' / 'cifar10' / 'resnet20_b64-20e_cifar10-npz.py'
FILES = {
    # file: network, parameters stored, accuracy stored in the file, accuracy on 1,017 test images
    'associativeconv/resnet56_dense_acc93.43.t7': ('ResNet-56', 853_018, 93.43, 94.30),
    'associativeconv/resnet56_csg_s12_c72_acc92.37.t7': ('ResNet-56', 160_450, 92.37, 92.43),
    'associativeconv/densenetbc40-36_csg_s12_c72_acc94.95.t7': ('DenseNet-BC 40-36', 842_842, 94.95, None),
    'associativeconv/shufflenetv2_dense_acc90.33.t7': ('ShuffleNetV2 0.5x', 352_042, 90.33, None),
}
AKAMASTER = {
    'akamaster/resnet20-12fca82f.th': ('ResNet-20', 269_722, 91.78),
    'akamaster/resnet32-d509ac18.th': ('ResNet-32', 464_154, 92.78),
}


@pytest.fixture(scope='module')
def reference(real_data):
    folder = real_data.parent / 'reference'
    assert folder.is_dir(), f'{folder} is missing'
    return folder


@pytest.fixture(scope='module')
def test_images(real_data):
    arrays = np.load(real_data / 'cifar10-subset.npz')
    pixels = torch.from_numpy(arrays['x_test']).permute(0, 3, 1, 2).float() / 255
    return pixels, torch.from_numpy(arrays['y_test'])


def normalise(pixels, mean=(0.4914, 0.4822, 0.4465), std=(0.2023, 0.1994, 0.2010)):
    return (pixels - torch.as_tensor(mean).view(3, 1, 1)) / torch.as_tensor(std).view(3, 1, 1)


def convert(path):
    converted = convert_released(path, Config.fromfile(LIKE))
    model = build_model(converted.config).eval()
    load_weights(model, converted.state_dict)
    return converted, model


def logits(model, x):
    with torch.no_grad():
        return torch.cat([model.head(model.extract_feat(part)) for part in x.split(128)])


# The dense ResNet-56, whose generated twin is here too, and DenseNet take longest.
LONG = ('associativeconv/resnet56_dense_acc93.43.t7', 'associativeconv/densenetbc40-36_csg_s12_c72_acc94.95.t7')


@pytest.mark.parametrize(
    'file', [pytest.param(file, marks=[pytest.mark.full] if file in LONG else []) for file in FILES]
)
def test_logits_are_those_of_the_authors_formulas(file, reference, test_images):
    network, params, stored, measured = FILES[file]
    converted, model = convert(reference / file)
    assert (converted.released.network, summarise(model).stored_params) == (network, params)
    assert converted.released.accuracy == pytest.approx(stored)
    pixels, labels = test_images
    if measured is None:
        pixels, labels = pixels[:128], labels[:128]
    found = logits(model, normalise(pixels))
    tensors = {name.removeprefix('module.'): tensor for name, tensor in read_tensors(reference / file)['net'].items()}
    with torch.no_grad():
        expected = torch.cat([evaluate(tensors, part) for part in normalise(pixels).split(128)])
    assert (found - expected).abs().max() < 1e-5 * expected.abs().max()
    # Without float32's rounding, the same to 1e-5 absolute.
    few = normalise(pixels[:16]).double()
    exact = evaluate({name: tensor.double() for name, tensor in tensors.items()}, few)
    assert (logits(model.double(), few) - exact).abs().max() < 1e-5
    accuracy = 100 * (found.argmax(1) == labels).double().mean().item()
    assert accuracy == pytest.approx(measured, abs=0.005) if measured else accuracy > 85


def with_value(tensors, ending, value):
    """Return tensors in half precision, of which the first value of the first of that name is another."""
    first = next(tensor for name, tensor in tensors.items() if name.endswith(ending))
    changed = first.half()
    changed.view(-1)[0] = value
    # By identity: the authors' files repeat the generator.
    return {
        name: changed if tensor is first else tensor.half() if tensor.is_floating_point() else tensor
        for name, tensor in tensors.items()
    }


def test_a_real_file_whose_variance_overflowed_is_read(reference, test_images, tmp_path):
    file = 'associativeconv/resnet56_csg_s12_c72_acc92.37.t7'
    tensors = with_value(read_tensors(reference / file)['net'], 'running_var', math.inf)
    _, model = convert(save(tmp_path / 'half.t7', tensors, prefix=''))
    pixels, labels = test_images
    found = logits(model, normalise(pixels))
    accuracy = 100 * (found.argmax(1) == labels).double().mean().item()
    assert summarise(model).stored_params == 160_450
    assert model.backbone.bn1.running_var[0] == math.inf
    # As measured in float32 with the first channel of the first norm set to its bias; two images may turn.
    assert accuracy == pytest.approx(92.13, abs=0.2)


@pytest.mark.parametrize('file', AKAMASTER)
def test_akamasters_dense_networks_classify_as_they_say(file, reference, test_images):
    network, params, stored = AKAMASTER[file]
    converted, model = convert(reference / file)
    assert (converted.released.network, summarise(model).stored_params) == (network, params)
    assert converted.released.accuracy == pytest.approx(stored)
    preprocessor = converted.config.data_preprocessor
    x = normalise(test_images[0], *(torch.tensor(preprocessor[key]) / 255 for key in ('mean', 'std')))
    accuracy = 100 * (logits(model, x).argmax(1) == test_images[1]).double().mean().item()
    # A thousand of the ten thousand images that the stored figure is of: two standard deviations.
    assert accuracy == pytest.approx(stored, abs=1.8)


def authors_tensors(kind, *, side, code_dim, seed=0):
    """Make random tensors with the names, shapes and repetitions of the authors' code."""
    rng = torch.Generator().manual_seed(seed)
    tensors = {}

    def draw(name, *shape):
        tensors[name] = torch.randn(shape, generator=rng) * (2 / max(1, np.prod(shape[1:]))) ** 0.5

    def norm(name, channels):
        for part in ('weight', 'running_var'):
            tensors[f'{name}.{part}'] = torch.rand(channels, generator=rng) + 0.5
        for part in ('bias', 'running_mean'):
            tensors[f'{name}.{part}'] = torch.randn(channels, generator=rng) * 0.1
        tensors[f'{name}.num_batches_tracked'] = torch.tensor(7)

    def codes(name, out_channels, in_channels):
        draw(name, -(-out_channels // side) * -(-in_channels // side), code_dim)

    def generator(prefix, spelling, kernel):
        first = next((tensors[name] for name in tensors if name.endswith(spelling)), None)
        if first is None:
            draw(f'{prefix}{spelling}', side * side * kernel**2, code_dim)
            tensors[f'{prefix}{spelling}'] *= 0.1
        else:
            tensors[f'{prefix}{spelling}'] = first

    if kind.startswith('resnet'):
        generator('', 'CSG.weight', 3)
        draw('conv_1_3x3.weight', 16, 3, 3, 3)
        norm('bn_1', 16)
        before = 16
        for stage, channels in ((1, 16), (2, 32), (3, 64)):
            for block in range((int(kind[6:]) - 2) // 6):
                name = f'stage_{stage}.{block}'
                codes(f'{name}.code', channels, before)
                codes(f'{name}.code2', channels, channels)
                generator(f'{name}.', 'CSG.weight', 3)
                norm(f'{name}.bn_a', channels)
                norm(f'{name}.bn_b', channels)
                before = channels
        draw('classifier.weight', 10, 64)
        draw('classifier.bias', 10)
    elif kind == 'densenet40-48':
        growth = 48
        channels = 2 * growth
        draw('conv1.weight', channels, 3, 3, 3)
        generator('', 'CLG.weight', 3)
        for stage in (1, 2, 3):
            for block in range(6):
                name = f'dense{stage}.{block}'
                codes(f'{name}.code2', growth, 4 * growth)
                generator(f'{name}.', 'CLG.weight', 3)
                norm(f'{name}.bn1', channels)
                draw(f'{name}.conv1.weight', 4 * growth, channels, 1, 1)
                norm(f'{name}.bn2', 4 * growth)
                channels += growth
            norm(f'trans{stage}.bn', channels)
            if stage < 3:
                draw(f'trans{stage}.conv.weight', channels // 2, channels, 1, 1)
                channels //= 2
        draw('linear.weight', 10, channels)
        draw('linear.bias', 10)
    elif kind == 'mobilenet':
        generator('', 'CSG.weight', 1)
        draw('conv1.weight', 32, 3, 3, 3)
        norm('bn1', 32)
        stages = ((1, 16, 1, 1), (6, 24, 2, 1), (6, 32, 3, 2), (6, 64, 4, 2))
        stages += ((6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))
        before, block = 32, 0
        for expansion, channels, blocks, stride in stages:
            for position in range(blocks):
                name, width = f'layers.{block}', before * expansion
                codes(f'{name}.code1', width, before)
                generator(f'{name}.', 'CSG.weight', 1)
                norm(f'{name}.bn1', width)
                draw(f'{name}.conv2.weight', width, 1, 3, 3)
                norm(f'{name}.bn2', width)
                draw(f'{name}.conv3.weight', channels, width, 1, 1)
                norm(f'{name}.bn3', channels)
                if (stride == 1 or position > 0) and before != channels:
                    draw(f'{name}.shortcut.0.weight', channels, before, 1, 1)
                    norm(f'{name}.shortcut.1', channels)
                before, block = channels, block + 1
        draw('conv2.weight', 1280, 320, 1, 1)
        norm('bn2', 1280)
        draw('linear.weight', 10, 1280)
        draw('linear.bias', 10)
    else:
        in_blocks = kind == 'shufflenet, blocks'
        generator('', 'CSG.weight', 1)
        draw('conv1.weight', 24, 3, 3, 3)
        norm('bn1', 24)
        before = 24
        for stage, (channels, blocks) in enumerate(((48, 3), (96, 7), (192, 3)), start=1):
            half = channels // 2

            def pointwise(name, number, out_channels, in_channels, generated):
                if generated:
                    codes(f'{name}.code{number}', out_channels, in_channels)
                else:
                    draw(f'{name}.conv{number}.weight', out_channels, in_channels, 1, 1)
                norm(f'{name}.bn{number}', out_channels)

            def depthwise(name, number, width):
                draw(f'{name}.conv{number}.weight', width, 1, 3, 3)
                norm(f'{name}.bn{number}', width)

            name = f'layer{stage}.0'
            depthwise(name, 1, before)
            pointwise(name, 2, half, before, in_blocks)
            pointwise(name, 3, half, before, in_blocks)
            depthwise(name, 4, half)
            pointwise(name, 5, half, half, False)
            for block in range(1, blocks + 1):
                name = f'layer{stage}.{block}'
                pointwise(name, 1, half, half, in_blocks)
                depthwise(name, 2, half)
                pointwise(name, 3, half, half, False)
            before = channels
        if in_blocks:
            draw('conv2.weight', 1024, before, 1, 1)
        else:
            codes('code2', 1024, before)
        norm('bn2', 1024)
        draw('linear.weight', 10, 1024)
        draw('linear.bias', 10)
    return tensors


# network, slice side, code length, parameters stored as counted from the authors' code (METHOD's golden numbers),
# or None where they published no count.
MADE = {
    'resnet20': ('ResNet-20', 16, 72, 176_698),
    'resnet56': ('ResNet-56', 16, 128, 347_162),
    'densenet40-48': ('DenseNet-BC 40-48', 12, 72, 1_416_394),
    'mobilenet': ('MobileNetV2', 16, 16, 1_595_322),
    'shufflenet': ('ShuffleNetV2 0.5x', 16, 16, 171_818),
    'shufflenet, blocks': ('ShuffleNetV2 0.5x', 16, 16, None),
}
NEVER_INFINITE = (
    'running_mean',
    'bn_1.weight',
    'bn_1.bias',
    '.code',
    'CSG.weight',
    'classifier.weight',
    'conv_1_3x3.weight',
)


def save(path, tensors, *, prefix='module.', **others):
    torch.save({'net': {prefix + name: tensor for name, tensor in tensors.items()}, **others}, path)
    return path


@pytest.mark.parametrize('half', [False, True], ids=['float32', 'float16'])
@pytest.mark.parametrize('kind', MADE)
def test_every_released_network_is_recognised_and_evaluated_as_the_authors_do(kind, half, tmp_path):
    network, side, code_dim, params = MADE[kind]
    tensors = authors_tensors(kind, side=side, code_dim=code_dim)
    if half:
        tensors = {name: tensor.half() if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}
    converted, model = convert(save(tmp_path / 'misnamed_resnet20_s8_d9.t7', tensors, acc=91.64, epoch=3))
    released = converted.released
    assert (released.network, released.csg['code_dim']) == (network, code_dim)
    assert released.csg['slice_shape'][:2] == (side, side)
    assert params is None or summarise(model).stored_params == params
    assert {tensor.dtype for tensor in converted.state_dict.values()} <= {torch.float32, torch.int64, torch.int32}
    x = torch.randn(6, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    exact = {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}
    expected = evaluate(exact, x)
    assert (logits(model, x) - expected).abs().max() < 1e-5 * expected.abs().max()


@pytest.mark.parametrize('kind', MADE)
def test_a_variance_that_overflowed_makes_the_channel_its_bias(kind, tmp_path):
    _, side, code_dim, _ = MADE[kind]
    tensors = with_value(authors_tensors(kind, side=side, code_dim=code_dim), 'running_var', 1e5)
    _, model = convert(save(tmp_path / 'x.t7', tensors))
    x = torch.randn(6, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    expected = evaluate({name: each.float() if each.is_floating_point() else each for name, each in tensors.items()}, x)
    assert any(each.isinf().any() for each in tensors.values()) and expected.isfinite().all()
    assert (logits(model, x) - expected).abs().max() < 1e-5 * expected.abs().max()


@pytest.mark.parametrize(
    ('ending', 'value'),
    [
        ('running_var', math.nan),
        ('running_var', -math.inf),
        *((ending, value) for ending in NEVER_INFINITE for value in (math.nan, math.inf)),
    ],
)
def test_other_values_that_are_not_finite_are_refused(ending, value, tmp_path):
    tensors = with_value(authors_tensors('resnet20', side=12, code_dim=72), ending, value)
    with pytest.raises(CSGError, match='holds NaN or infinite values; take a checkpoint from before training diverged'):
        convert(save(tmp_path / 'x.t7', tensors))


@pytest.mark.parametrize('prefix', ['', 'module.', 'module.module.'])
def test_prefixes_do_not_matter(prefix, tmp_path):
    tensors = authors_tensors('resnet20', side=12, code_dim=72)
    converted, _ = convert(save(tmp_path / 'x.t7', tensors, prefix=prefix))
    assert converted.released.network == 'ResNet-20'
    assert converted.released.accuracy is None


def test_a_binary_generator_stays_frozen(tmp_path):
    tensors = authors_tensors('resnet20', side=12, code_dim=72)
    signs = tensors['CSG.weight'].sign() * 0.5
    tensors = {name: signs if name.endswith('CSG.weight') else tensor for name, tensor in tensors.items()}
    converted, model = convert(save(tmp_path / 'x.t7', tensors))
    assert converted.config.model.csg['freeze_generator'] is True
    assert summarise(model).trainable_params == 115_426 - 72 * 1296
    assert set(model.csg[0].weight.unique().tolist()) == {-0.5, 0.5}


def lacking(name):
    tensors = authors_tensors('resnet20', side=12, code_dim=72)
    return {key: tensor for key, tensor in tensors.items() if not key.endswith(name)}


def changed(**changes):
    return authors_tensors('resnet20', side=12, code_dim=72) | {
        name.replace('__', '.'): tensor for name, tensor in changes.items()
    }


@pytest.mark.parametrize(
    ('content', 'says'),
    [
        ({'net': {'a.weight': torch.ones(2, 3), 'b': torch.ones(1)}}, r'2 tensors, a.weight \(2, 3\)'),
        ({'net': lacking('CSG.weight')}, 'codes .* but no generator'),
        ({'net': lacking('classifier.bias')}, 'head.fc.bias is missing'),
        ({'net': lacking('classifier.weight')}, 'no network known here'),
        ({'net': {1: torch.ones(1)}}, '1 is not a tensor'),
        ({'net': changed(CSG__weight=torch.ones(1296))}, r'CSG.weight is \(1296,\); generators and codes are matrices'),
        ({'net': changed(stage_1__0__code=torch.ones(0, 72))}, 'generators and codes are matrices'),
        ({'net': changed(classifier__weight=torch.tensor(1.0))}, 'a damaged network'),
        ({'net': dict(torchvision.models.resnet18().state_dict())}, 'no network known here: 122 tensors'),
        ({'net': lacking('stage_2.1.bn_b.weight')}, 'does not fit'),
        ({'net': lacking('stage_3.0.code2')}, 'backbone.layer3.0.conv2.weight is missing'),
        ({'net': changed(stage_1__0__CSG__weight=torch.ones(1296, 72))}, 'differs from CSG.weight'),
        ({'net': changed(stage_1__0__extra__weight=torch.ones(2))}, 'stage_1.0.extra.weight is not a layer'),
        ({'net': changed(stage_1__0__code=torch.ones(4, 71))}, 'codes of length 71 do not fit'),
        ({'net': changed(stage_1__0__code=torch.ones(5, 72))}, 'layer1.0.conv1.code'),
        ({'net': {'a': 'text'}}, 'a is not a tensor'),
        ({'net': {}}, 'empty'),
        ([torch.ones(2)], 'holds a list'),
    ],
    ids=lambda value: value if isinstance(value, str) else '',
)
def test_an_unknown_file_is_refused_with_what_was_found(content, says, tmp_path):
    path = tmp_path / 'file.t7'
    torch.save(content, path)
    with pytest.raises(CSGError, match=says) as caught:
        convert(path)
    assert str(path) in str(caught.value)


def test_an_accuracy_that_is_none_does_not_matter(tmp_path):
    converted, _ = convert(save(tmp_path / 'x.t7', authors_tensors('resnet20', side=12, code_dim=72), acc=['high']))
    assert converted.released.accuracy is None


def test_a_config_with_a_generator_of_its_own_lends_data_and_schedule_alone(tmp_path):
    file = save(tmp_path / 'x.t7', authors_tensors('resnet20', side=12, code_dim=72))
    like = Config.fromfile(LIKE.with_name(f'csg-s12-d72-binary_{LIKE.name}'))
    assert convert_released(file, like).config.model.csg.get('generator', 'linear') == 'linear'


def test_a_config_of_another_kind_of_network_is_refused(tmp_path):
    file = save(tmp_path / 'x.t7', authors_tensors('resnet20', side=12, code_dim=72))
    like = Config.fromfile(LIKE)
    like.model.head.num_classes = 7
    with pytest.raises(CSGError, match='has 10 classes, and the config given as --like has 7'):
        convert_released(file, like)
    like.model.head.type = 'VisionTransformerClsHead'
    with pytest.raises(CSGError, match='LinearClsHead'):
        convert_released(file, like)


class Malice:
    def __reduce__(self):
        return print, ('unpickled',)


def test_nothing_else_is_unpickled(tmp_path, capfd):
    path = tmp_path / 'file.t7'
    torch.save({'net': Malice()}, path)
    with pytest.raises(CSGError, match='not unpickled'):
        convert(path)
    assert 'unpickled' not in capfd.readouterr().out


def test_dense_channels_are_put_back_in_order():
    tensors = authors_tensors('densenet40-48', side=12, code_dim=72)
    names = ('dense2.3.bn1.weight', 'backbone.stages.2.block.3.norm1.weight')
    marks = torch.cat([torch.full((48,), 3.0 - each) for each in range(3)] + [torch.zeros(192)])
    released = read_released({'net': tensors | {'dense2.3.bn1.weight': marks}})
    found = released.tensors[names[1].replace('stages.2', 'stages.1')]
    assert torch.equal(found, torch.cat([torch.zeros(192)] + [torch.full((48,), 1.0 + each) for each in range(3)]))


def test_the_tool_writes_checkpoint_and_config_that_the_other_tools_take(tmp_path):
    file = save(tmp_path / 'x.t7', authors_tensors('shufflenet', side=16, code_dim=16), acc=90.2, epoch=1)
    out = tmp_path / 'made' / 'shuffle.pth'
    tool = ('model_converters/released2csg.py', file, '--out', out)
    printed = json.loads(run_tool(*tool, '--json').stdout)
    assert printed['network'] == 'ShuffleNetV2 0.5x'
    assert (printed['slice_shape'], printed['code_dim']) == ([16, 16, 1, 1], 16)
    assert (printed['stored_params'], printed['stored_accuracy']) == (171_818, 90.2)
    report = run_tool('report.py', out.with_suffix('.py'), '--checkpoint', out)
    assert '171,818 parameters stored' in report.stdout
    again = run_tool(*tool, check=False)
    assert again.returncode == 1
    assert 'exists' in again.stderr.splitlines()[-1]
