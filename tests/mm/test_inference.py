"""Any of a trained network's files looks at an image."""

import json
import shutil

import mmcv
import numpy as np
import pytest
import torch
from conftest import ROOT, run_tool
from mmengine.dataset import pseudo_collate
from mmengine.registry import DATASETS
from mmpretrain.datasets import CIFAR10
from mmseg.apis import MMSegInferencer
from mmseg.datasets import PascalVOCDataset

import csg_seg
from csg_seg.deploy.compact_export import compact
from csg_seg.deploy.inference import _write_name, draw, inputs, load_network, name_classes, predict
from csg_seg.errors import CSGError
from csg_seg.mm.model import build_model
from csg_seg.running.configs import read_config

DEMO = ROOT / 'configs' / 'demo' / 'csg-6x_deeplabv3_r18-d8-w32_drawn-voc-64x64.py'
DENSE = DEMO.with_name(DEMO.name.removeprefix('csg-6x_'))
CIFAR = ROOT / 'configs' / 'cifar10' / 'csg-s12-d72_resnet20_b64-20e_cifar10-npz.py'
META = {'classes': [f'class {index}' for index in range(21)], 'palette': [[index * 9, 0, 99] for index in range(21)]}

PALETTE = [[10, 20, 30], [200, 100, 0]]


@pytest.fixture(scope='module')
def files(tmp_path_factory):
    """A CSG checkpoint, its compact and its materialised one, and an image."""
    folder = tmp_path_factory.mktemp('files')
    torch.manual_seed(0)
    model = build_model(read_config(str(DEMO)))
    torch.save({'meta': {'dataset_meta': META}, 'state_dict': model.state_dict()}, folder / 'csg.pth')
    compact(read_config(str(DEMO)), folder / 'csg.pth', folder / 'csg.safetensors', dtype='float32')
    torch.save(
        {'meta': {'dataset_meta': META}, 'state_dict': csg_seg.materialise(model).state_dict()}, folder / 'dense.pth'
    )
    image = np.random.default_rng(0).integers(0, 255, (70, 90, 3), dtype=np.uint8)
    mmcv.imwrite(image, str(folder / 'image.png'))
    return folder


def test_every_file_gives_the_same_scores(files):
    given = [(DEMO, 'csg.pth'), (DEMO, 'csg.safetensors'), (None, 'csg.safetensors'), (DENSE, 'dense.pth')]
    networks = [load_network(config, files / name) for config, name in given]
    scores = [predict(network, files / 'image.png').seg_logits.data for network in networks]
    assert scores[0].shape == (21, 70, 90)
    for network, each in zip(networks, scores, strict=True):
        torch.testing.assert_close(each, scores[0], rtol=1e-4, atol=1e-5)
        assert list(network.dataset_meta['classes']) == META['classes']


def test_mmsegs_inferencer_runs_the_materialised_file_under_the_dense_config(files):
    ours = predict(load_network(DEMO, files / 'csg.pth'), files / 'image.png').pred_sem_seg.data[0]
    inferencer = MMSegInferencer(str(DENSE), weights=str(files / 'dense.pth'), device='cpu')
    theirs = inferencer(str(files / 'image.png'), show=False)['predictions']
    # Rounding may settle a tie of two classes either way.
    assert np.mean(theirs == ours.numpy()) > 0.999


def test_shares_of_the_pixels_and_the_colours_agree_with_the_prediction(files):
    network = load_network(None, files / 'csg.safetensors')
    prediction = predict(network, files / 'image.png')
    found = prediction.pred_sem_seg.data[0]
    shares = name_classes(network, prediction, most=21)
    assert sum(shares.values()) == pytest.approx(100, abs=0.2)
    for index, name in enumerate(META['classes']):
        assert shares.get(name, 0) == pytest.approx(100 * (found == index).float().mean().item(), abs=0.01)
    assert list(shares.values()) == sorted(shares.values(), reverse=True)
    picture = draw(network, files / 'image.png', prediction, opacity=1.0)
    assert picture.shape == (70, 90, 3)
    drawn = torch.from_numpy(picture.copy()).int()
    right = (drawn == torch.tensor(META['palette'])[found]).all(dim=-1).float().mean()
    assert right > 0.5  # names of classes lie upon the rest


@pytest.mark.parametrize('scale', [1, 2, 5])
def test_a_larger_picture_shows_the_same(files, scale):
    network = load_network(None, files / 'csg.safetensors')
    prediction = predict(network, files / 'image.png')
    picture = draw(network, files / 'image.png', prediction, opacity=1.0, scale=scale)
    assert picture.shape == (scale * 70, scale * 90, 3)
    found = prediction.pred_sem_seg.data[0].numpy()
    wanted = np.kron(np.array(META['palette'])[found], np.ones((scale, scale, 1), int))
    assert (picture == wanted).all(axis=-1).mean() > 0.5  # names of classes lie upon the rest


@pytest.fixture
def binary(tmp_path, files):
    """The files of a network that tells two classes apart by one score and a threshold."""
    cfg = read_config(str(DEMO))
    two = dict(num_classes=2, out_channels=1, loss_decode=dict(type='CrossEntropyLoss', use_sigmoid=True))
    cfg.model.decode_head.update(two, threshold=0.5)
    cfg.model.auxiliary_head.update(two, threshold=0.5)
    torch.manual_seed(0)
    model = build_model(cfg)
    model.cfg = cfg
    middle = predict(model.eval(), files / 'image.png').seg_logits.data.median()
    model.decode_head.conv_seg.bias.data -= middle.logit()  # scores on both sides of the threshold
    cfg.dump(tmp_path / 'binary.py')
    for name, meta in (
        ('named', {'classes': ('background', 'lane'), 'palette': PALETTE}),
        ('coloured', {'palette': PALETTE}),
        ('bare', {}),
    ):
        torch.save({'meta': {'dataset_meta': meta}, 'state_dict': model.state_dict()}, tmp_path / f'{name}.pth')
        compact(cfg, tmp_path / f'{name}.pth', tmp_path / f'{name}.safetensors', dtype='float32')
    return tmp_path


@pytest.mark.parametrize(
    ('name', 'names'), [('named', ['background', 'lane']), ('coloured', ['0', '1']), ('bare', ['0', '1'])]
)
@pytest.mark.parametrize('config', [None, 'binary.py'])
def test_one_score_and_a_threshold_make_two_classes(name, names, config, binary, files):
    config = config and binary / config
    network = load_network(config, binary / f'{name}.safetensors')
    prediction = predict(network, files / 'image.png')
    lane = prediction.seg_logits.data[0] > 0.5
    share = 100 * lane.float().mean().item()
    assert 1 < share < 99
    wanted = {names[0]: pytest.approx(100 - share, abs=0.01), names[1]: pytest.approx(share, abs=0.01)}
    assert name_classes(network, prediction) == wanted
    picture = torch.from_numpy(draw(network, files / 'image.png', prediction, opacity=1.0).copy()).int()
    # The commonest colour of each class, because names of classes lie upon the rest.
    colours = [picture[lane == each].mode(dim=0).values.tolist() for each in (False, True)]
    assert colours[0] != colours[1]
    assert name == 'bare' or colours == PALETTE
    assert (picture == torch.tensor(colours)[lane.long()]).all(dim=-1).float().mean() > 0.5


VOC = dict(type='PascalVOCDataset', data_root='nowhere', pipeline=[])
OWN = [f'own {index}' for index in range(21)]


@pytest.mark.parametrize(
    ('dataset', 'names'),
    [
        (VOC, PascalVOCDataset.METAINFO['classes']),
        (dict(type='RepeatDataset', times=2, dataset=VOC), PascalVOCDataset.METAINFO['classes']),
        (dict(type='ConcatDataset', datasets=[VOC, VOC]), PascalVOCDataset.METAINFO['classes']),
        (dict(type='mmseg.PascalVOCDataset', data_root='nowhere'), PascalVOCDataset.METAINFO['classes']),
        (dict(type='BaseSegDataset', metainfo=dict(classes=OWN)), OWN),
        (dict(type='BaseSegDataset'), [*map(str, range(21))]),
        (dict(type='CamVidDataset'), [*map(str, range(21))]),  # of another number of classes
        (dict(type='Unknown'), [*map(str, range(21))]),
    ],
)
def test_a_config_names_the_classes_that_a_checkpoint_does_not(dataset, names, files, tmp_path):
    cfg = read_config(str(DEMO))
    for split in ('train', 'val', 'test'):
        cfg[f'{split}_dataloader'].dataset = dataset
    cfg.dump(tmp_path / 'named.py')
    torch.save({'state_dict': build_model(cfg).state_dict()}, tmp_path / 'x.pth')
    network = load_network(tmp_path / 'named.py', tmp_path / 'x.pth')
    prediction = predict(network, files / 'image.png')
    found = prediction.pred_sem_seg.data[0]
    shares = name_classes(network, prediction, most=21)
    assert shares == {
        names[index]: pytest.approx(100 * (found == index).float().mean().item(), abs=0.01)
        for index in found.unique().tolist()
    }
    assert draw(network, files / 'image.png', prediction, opacity=1.0).shape == (70, 90, 3)
    # What the checkpoint says goes before.
    assert load_network(tmp_path / 'named.py', files / 'csg.pth').dataset_meta == META


def test_a_config_names_the_classes_of_a_classifier(tmp_path):
    torch.save({'state_dict': build_model(read_config(str(CIFAR))).state_dict()}, tmp_path / 'x.pth')
    mmcv.imwrite(np.zeros((32, 32, 3), np.uint8), str(tmp_path / 'image.png'))
    network = load_network(CIFAR, tmp_path / 'x.pth')
    found = name_classes(network, predict(network, tmp_path / 'image.png'), most=10)
    assert found.keys() == {*CIFAR10.METAINFO['classes']}


def test_names_of_other_classes_are_not_given(files):
    network = load_network(DEMO, files / 'csg.pth')
    prediction = predict(network, files / 'image.png')
    named = name_classes(network, prediction, most=21)
    for meta in ({'classes': ['one', 'two']}, {'classes': None}, {}, None):
        network.dataset_meta = meta
        found = name_classes(network, prediction, most=21)
        assert [f'class {each}' for each in found] == [*named]
        assert draw(network, files / 'image.png', prediction, opacity=0.5).shape == (70, 90, 3)


@pytest.mark.parametrize('scale', [1, 8])
def test_long_names_are_made_smaller(scale):
    name = 'chest of drawers, chest, bureau, dresser'
    picture, mask = np.full((200 * scale, 200 * scale, 3), 100, np.uint8), np.zeros((200 * scale, 200 * scale), bool)
    mask[100 * scale :, 150 * scale :] = True
    _write_name(picture, name, mask)
    columns = (picture != 100).any(axis=(0, 2)).nonzero()[0]
    assert columns.min() > 0 and columns.max() < 200 * scale - 1
    assert columns.max() - columns.min() > 150 * scale


def test_names_lie_in_their_regions_and_are_never_cut_off():
    boxes = {}
    for name, region in {'middle': np.s_[80:120, 200:300], 'corner': np.s_[-4:, -10:], 'top': np.s_[:4, :10]}.items():
        picture, mask = np.full((200, 500, 3), 100, np.uint8), np.zeros((200, 500), bool)
        mask[region] = True
        _write_name(picture, 'background', mask)
        rows, columns = (picture == 255).all(axis=-1).nonzero()
        boxes[name] = rows.min(), rows.max(), columns.min(), columns.max()
    assert len({(bottom - top, right - left) for top, bottom, left, right in boxes.values()}) == 1
    assert boxes['middle'][0] >= 80 and boxes['middle'][1] < 120
    assert abs(boxes['middle'][2] + boxes['middle'][3] - 500) <= 4


def test_a_file_and_its_array_are_one_image(files):
    network = load_network(None, files / 'csg.safetensors')
    array = mmcv.imread(str(files / 'image.png'))
    assert torch.equal(inputs(network, [files / 'image.png']), inputs(network, [array]))


def test_cifars_images_reach_the_network_as_its_data_set_gives_them(tmp_path, real_data):
    cfg = read_config(str(CIFAR))
    cfg.test_dataloader.dataset.data_root = str(real_data)
    dataset = DATASETS.build({**cfg.test_dataloader.dataset, '_scope_': 'mmpretrain'})
    array = np.load(real_data / 'cifar10-subset.npz')['x_test'][0]
    mmcv.imwrite(mmcv.rgb2bgr(array), str(tmp_path / 'image.png'))
    torch.save({'state_dict': build_model(cfg).state_dict()}, tmp_path / 'x.pth')
    network = load_network(CIFAR, tmp_path / 'x.pth')
    wanted = network.data_preprocessor(pseudo_collate([dataset[0]]))['inputs']
    assert torch.equal(inputs(network, [tmp_path / 'image.png']), wanted)
    prediction = predict(network, tmp_path / 'image.png')
    assert sum(name_classes(network, prediction, most=10).values()) == pytest.approx(100, abs=0.1)
    assert min(draw(network, tmp_path / 'image.png', prediction, opacity=0.5).shape[:2]) >= 224


def test_the_tool_draws_and_prints(files, tmp_path):
    out = tmp_path / 'seen.png'
    args = [files / 'image.png', files / 'csg.safetensors', '--out', out]
    shares = json.loads(run_tool('demo.py', *args, '--json').stdout)
    assert shares.keys() <= {*META['classes']}
    assert mmcv.imread(str(out)).shape == (70, 90, 3)
    again = run_tool('demo.py', *args, check=False)
    assert again.returncode == 1 and 'give --overwrite' in again.stderr.splitlines()[-1]
    small = run_tool('demo.py', *args, '--overwrite', '--scale', 0, check=False)
    assert small.returncode == 1 and '--scale 0: give a whole number of at least 1' in small.stderr.splitlines()[-1]


@pytest.mark.parametrize(
    ('config', 'checkpoint', 'says'),
    [
        (None, 'csg.pth', 'only a compact checkpoint can be loaded alone; give its config'),
        (DENSE, 'csg.pth', 'use its CSG config'),
        (DEMO, 'dense.pth', 'use it with the dense config'),
        (None, 'none.safetensors', 'no such file'),
        (None, 'image.safetensors', 'damaged, or not a compact checkpoint'),
    ],
)
def test_files_that_do_not_fit_are_named(config, checkpoint, says, files):
    shutil.copy(files / 'image.png', files / 'image.safetensors')
    with pytest.raises((CSGError, FileNotFoundError), match=says):
        load_network(config, files / checkpoint)


def test_what_is_no_image_is_named(files):
    network = load_network(None, files / 'csg.safetensors')
    with pytest.raises(CSGError, match=r'csg.pth: not an image \(.*; give a JPEG or PNG file'):
        predict(network, files / 'csg.pth')
    with pytest.raises(FileNotFoundError, match='no such image'):
        predict(network, files / 'none.png')
    with pytest.raises(FileNotFoundError, match='a folder, not an image'):
        predict(network, files)
    network.cfg.test_pipeline = []
    with pytest.raises(CSGError, match='there is no test_pipeline'):
        predict(network, files / 'image.png')
