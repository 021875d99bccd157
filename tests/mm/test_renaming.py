"""Checkpoints that other code wrote, under the names of our networks."""

import json
from collections import OrderedDict

import numpy as np
import pytest
import torch
from conftest import ROOT, cfg_options, run_tool
from PIL import Image
from torch import nn

from csg_seg.deploy.inference import load_network
from csg_seg.deploy.renaming import read_state_dict, rename_in_order
from csg_seg.errors import CSGError
from csg_seg.mm.checkpoints.reading import check_weights

CGNET = ROOT / 'configs' / 'cgnet' / 'cgnet_fcn_1xb8-20k_camvid-360x480.py'


def network(*, names, bias):
    """Two convs and a norm layer; the second conv may have a bias."""
    layers = nn.Conv2d(3, 5, 3, bias=False), nn.BatchNorm2d(5), nn.Conv2d(5, 5, 3, bias=bias)
    return nn.Sequential(OrderedDict(zip(names, layers, strict=True)))


def trained(**kwargs):
    torch.manual_seed(0)
    made = network(**kwargs)
    made(torch.randn(2, 3, 9, 9))  # moves the norm layer's statistics
    return made.eval()


THEIRS = {'names': ('a', 'b', 'c')}
OURS = {'names': ('stem', 'norm', 'head')}


@pytest.mark.parametrize('bias', [True, False])
def test_a_network_with_renamed_weights_computes_the_same(bias):
    theirs, ours = trained(bias=bias, **THEIRS), network(bias=True, **OURS).eval()
    renamed, added = rename_in_order(theirs.state_dict(), ours.state_dict())
    ours.load_state_dict(renamed)
    image = torch.randn(1, 3, 9, 9)
    assert torch.equal(ours(image), theirs(image))
    assert added == ([] if bias else ['head.bias'])


def test_files_older_than_the_counter_of_norm_layers_are_taken():
    theirs, ours = trained(bias=True, **THEIRS), network(bias=True, **OURS)
    state = {name: each for name, each in theirs.state_dict().items() if 'num_batches' not in name}
    renamed, _ = rename_in_order(state, ours.state_dict())
    assert renamed.keys() == ours.state_dict().keys() and renamed['norm.num_batches_tracked'] == 0


def test_denormal_numbers_become_zero_and_others_stay():
    ours = network(bias=True, **OURS)
    state = trained(bias=True, **THEIRS).state_dict()
    state['c.bias'] = torch.tensor([1e-39, -1e-40, 1.2e-38, -1.0, 0.0])
    renamed, _ = rename_in_order(state, ours.state_dict())
    assert torch.equal(renamed['head.bias'], torch.tensor([0, 0, 1.2e-38, -1.0, 0]))


def test_numbers_are_denormal_in_the_networks_precision():
    state = {name: each.half() for name, each in trained(bias=True, **THEIRS).state_dict().items()}
    state['c.bias'] = torch.tensor([3e-5, -3e-5, 1.0, 0, 0]).half()  # denormal in float16
    renamed, _ = rename_in_order(state, network(bias=True, **OURS).state_dict())
    assert torch.equal(renamed['head.bias'], state['c.bias'].float())


def test_a_bias_that_is_missing_is_not_taken_from_the_next_layer():
    def convs(biases):
        return nn.Sequential(*(nn.Conv2d(4, 4, 3, bias=bias) for bias in biases))

    theirs = nn.Sequential(OrderedDict(x=nn.Conv2d(4, 4, 3, bias=False), y=nn.PReLU(4), z=nn.Conv2d(4, 4, 3)))
    state = theirs.state_dict()
    state = {
        'x.weight': state['x.weight'],
        'shift.bias': torch.ones(4),
        **{k: v for k, v in state.items() if k[0] == 'z'},
    }
    with pytest.raises(CSGError, match='where the checkpoint has shift.bias'):
        rename_in_order(state, convs([True, True]).state_dict())


@pytest.mark.parametrize(
    ('change', 'says'),
    [
        (
            lambda state: [('a.weight', torch.zeros(5, 4, 3, 3)), *state[1:]],
            r'stem.weight \(5, 3, 3, 3\) where .*\(5, 4',
        ),
        (lambda state: [state[0], state[2], state[1], *state[3:]], r'norm.weight \(5,\) where .* has b.bias'),
        (lambda state: state[:3], r'norm.running_mean \(5,\) where the checkpoint ends'),
        (lambda state: [*state, ('d.weight', torch.zeros(1))], '1 tensors more than the config, the first d.weight'),
    ],
)
def test_another_network_or_order_is_refused(change, says):
    state = dict(change(list(trained(bias=True, **THEIRS).state_dict().items())))
    with pytest.raises(CSGError, match=says):
        rename_in_order(state, network(bias=True, **OURS).state_dict())


def test_the_tensors_are_found_in_the_file(tmp_path):
    state = {'x.weight': torch.ones(2)}
    for name, content in {
        'bare': state,
        'one': {'epoch': 3, 'model': state},
        'two': {'model': state, 'ema': {'x.weight': torch.zeros(2)}},
        'none': {'epoch': 3},
    }.items():
        torch.save(content, tmp_path / name)
    for name, entry in (('bare', None), ('one', None), ('one', 'model'), ('two', 'model')):
        assert torch.equal(read_state_dict(tmp_path / name, entry)['x.weight'], state['x.weight']), name
    for name, entry, says in (
        ('two', None, 'several state dicts; choose from --entry model, ema'),
        ('one', 'net', "no state dict in the entry 'net'; choose from --entry model"),
        ('none', None, 'no state dict; give a checkpoint'),
    ):
        with pytest.raises(CSGError, match=says):
            read_state_dict(tmp_path / name, entry)


def test_the_tool_refuses_a_csg_config(refused, tmp_path):
    torch.save({'x': torch.ones(1)}, tmp_path / 'x.pth')
    config = CGNET.with_name(f'csg-2x_{CGNET.name}')
    message = refused('model_converters/rename_weights.py', config, tmp_path / 'x.pth', '--out', tmp_path / 'y.pth')
    assert message.endswith('give the dense config of the network') and not (tmp_path / 'y.pth').exists()


@pytest.fixture(scope='module')
def released(real_data, tmp_path_factory):
    """CGNet as its authors trained it, the options that say where CamVid is, and the renamed checkpoint."""
    file = real_data.parent / 'reference' / 'cgnet' / 'cgnet_camvid_trainval.pth'
    if not file.is_file():
        pytest.skip(f'{file} is missing')
    out = tmp_path_factory.mktemp('cgnet') / 'cgnet.pth'
    run_tool('model_converters/rename_weights.py', CGNET, file, '--out', out)
    options = {'test_dataloader.dataset.data_root': real_data / 'camvid', 'test_dataloader.num_workers': 0}
    return file, out, {**options, 'test_dataloader.persistent_workers': False}


def score(checkpoint, options, folder, **more) -> float:
    arguments = [CGNET, checkpoint, '--json', '--work-dir', folder, *cfg_options({**options, **more})]
    return json.loads(run_tool('test.py', *arguments).stdout)['mIoU']


@torch.no_grad()
def plain_score(checkpoint, images) -> float:
    """MIoU of the network by a plain loop; images, classes and means are read without mmseg."""
    network = load_network(CGNET, checkpoint)
    intersections, unions = np.zeros(11), np.zeros(11)
    for path in images:
        pixels = np.asarray(Image.open(path), np.float32) - np.float32([110.33, 108.41, 105.03])
        labels = np.asarray(Image.open(str(path).replace('images', 'labels').replace('jpg', 'png')))
        scores = network.decode_head(network.backbone(torch.from_numpy(pixels).permute(2, 0, 1)[None]))
        scores = nn.functional.interpolate(scores, size=labels.shape, mode='bilinear')
        predicted = scores.argmax(dim=1)[0].numpy()[labels != 255]
        labels = labels[labels != 255]
        for each in range(11):
            intersections[each] += ((labels == each) & (predicted == each)).sum()
            unions[each] += ((labels == each) | (predicted == each)).sum()
    return float(100 * np.mean(intersections[unions > 0] / unions[unions > 0]))


def test_somebody_elses_cgnet_segments_camvid(released, tmp_path, refused):
    file, renamed, options = released
    few = {'test_dataloader.dataset.indices': 6}
    images = sorted((options['test_dataloader.dataset.data_root'] / 'images' / 'test').iterdir())
    scored = score(renamed, options, tmp_path, **few)
    assert scored > 60 and scored == pytest.approx(plain_score(renamed, images[:6]), abs=0.05)
    message = refused('test.py', CGNET, file, '--work-dir', tmp_path, *cfg_options({**options, **few}))
    assert 'stem.0.conv.weight is missing' in message and 'rename_weights.py renames its tensors' in message


@pytest.mark.full
def test_somebody_elses_cgnet_on_all_test_images(released, tmp_path):
    _, renamed, options = released
    # A loop in plain PyTorch, as above, gives 64.53 on these images too.
    assert score(renamed, options, tmp_path) == pytest.approx(64.53, abs=0.1)


def test_a_training_begins_with_some_fitting_weights_and_a_test_with_all():
    model = network(bias=True, **OURS)
    state = model.state_dict()
    others = {name: torch.zeros(*each.shape, 2) for name, each in state.items()}
    check_weights(model, {**others, 'stem.weight': state['stem.weight']}, complete=False)
    with pytest.raises(CSGError, match=r'stem.weight is \(5, 3, 3, 3, 2\) instead of \(5, 3, 3, 3\)'):
        check_weights(model, others, complete=False)
    with pytest.raises(CSGError, match='norm.weight is'):
        check_weights(model, {**others, 'stem.weight': state['stem.weight']}, complete=True)
    check_weights(model, {f'module.{name}': each for name, each in state.items()}, complete=True)
