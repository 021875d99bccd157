"""A dense network teaches a generated one: the losses, the dense weights that fade out, and the hook that pulls."""

import copy

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.logging import MessageHub
from mmengine.registry import MODELS, init_default_scope
from mmengine.runner import Runner
from mmpretrain.structures import DataSample
from torch import nn

from csg_seg import fit, materialise
from csg_seg.errors import CSGError
from csg_seg.layers.bank import find_bank
from csg_seg.layers.conv import generated_convs
from csg_seg.mm.teacher import divergence

CSG = dict(slice_shape=(4, 4, 3, 3), code_dim=6)
BLOCKS = ['backbone.layer*.*']


def dense_model(base_channels=4) -> dict:
    head = dict(type='LinearClsHead', num_classes=10, in_channels=4 * base_channels)
    return dict(
        type='ImageClassifier',
        data_preprocessor=dict(num_classes=10, mean=[127] * 3, std=[60] * 3),
        backbone=dict(type='CIFARResNet', depth=8, base_channels=base_channels),
        neck=dict(type='GlobalAveragePooling'),
        head=dict(**head, loss=dict(type='CrossEntropyLoss')),
    )


def csg_model(csg, teacher=None) -> dict:
    base = dense_model()
    return {**base, 'type': 'CSGModel', 'base_type': base['type'], 'csg': csg, 'teacher': teacher}


def build(model: dict) -> nn.Module:
    init_default_scope('mmpretrain')
    torch.manual_seed(0)
    network = MODELS.build(copy.deepcopy(model))
    network.init_weights()
    return network.train()


@pytest.fixture(scope='module')
def checkpoint(tmp_path_factory):
    """A dense network that CSG fits exactly, whose running statistics are those of some images."""
    network = materialise(build(csg_model(CSG)))
    with torch.no_grad():
        for _ in range(20):
            network(batch()[0], mode='tensor')
    path = tmp_path_factory.mktemp('dense') / 'dense.pth'
    torch.save({'meta': {}, 'state_dict': network.state_dict()}, path)
    return str(path)


def batch(n=6):
    rng = torch.Generator().manual_seed(0)
    images = torch.randn(n, 3, 16, 16, generator=rng)
    return images, [DataSample().set_gt_label(label % 10) for label in range(n)]


def losses(network) -> dict:
    images, samples = batch()
    return network(inputs=images, data_samples=samples, mode='loss')


@pytest.fixture
def progress():
    """Set how far the training is."""
    hub = MessageHub.get_instance('progress')

    def at(step, of):
        hub.update_info('iter', step - 1)
        hub.update_info('max_iters', of)

    return at


# --- losses ---


@pytest.mark.parametrize('dim', [1, 2])
def test_divergence_is_the_sum_of_its_definition(dim):
    mine, wanted = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    total = []
    for index in range(2):
        for other in range(4 if dim == 1 else 3):
            p = (wanted[index, :, other] if dim == 1 else wanted[index, other]).div(2.5).softmax(0)
            q = (mine[index, :, other] if dim == 1 else mine[index, other]).div(2.5).softmax(0)
            total.append((p * (p / q).log()).sum())
    expected = 2.5**2 * torch.stack(total).mean()
    assert divergence(mine, wanted, 2.5, dim=dim).item() == pytest.approx(expected.item(), rel=1e-5)
    assert divergence(mine, mine, 2.5, dim=dim).item() == pytest.approx(0, abs=1e-6)


def test_a_student_that_equals_its_teacher_has_nothing_to_learn(checkpoint):
    teacher = dict(checkpoint=checkpoint, labels=0.0, features=1.0, layers=BLOCKS)
    student = build(csg_model(CSG, teacher))
    # By its own running statistics, as the teacher; a step that normalises by the batch would change them.
    for module in student.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    same = losses(student)
    assert set(same) == {'loss_labels', 'loss_teacher_logits', 'loss_teacher_features'}
    assert same['loss_labels'].item() == 0
    assert same['loss_teacher_logits'].item() < 1e-6
    assert same['loss_teacher_features'].item() < 1e-6
    worse = build(csg_model({**CSG, 'code_dim': 2}, teacher))
    assert losses(worse)['loss_teacher_features'].item() > 0.01


def test_factors_scale_the_losses(checkpoint):
    one = losses(build(csg_model(CSG, dict(checkpoint=checkpoint, features=1.0))))
    two = losses(build(csg_model(CSG, dict(checkpoint=checkpoint, labels=2.0, logits=3.0, features=5.0))))
    for name, factor in (('loss_labels', 2), ('loss_teacher_logits', 3), ('loss_teacher_features', 5)):
        assert two[name].item() == pytest.approx(factor * one[name].item(), rel=1e-5)
    alone = losses(build(csg_model(CSG, dict(checkpoint=checkpoint, logits=0.0))))
    assert set(alone) == {'loss_labels'}


def test_the_teacher_is_no_part_of_the_student(checkpoint):
    student = build(csg_model(CSG, dict(checkpoint=checkpoint, features=1.0, layers=BLOCKS)))
    plain = build(csg_model(CSG))
    sum(losses(student).values()).backward()
    assert student.state_dict().keys() == plain.state_dict().keys()
    assert len(list(student.modules())) == len(list(plain.modules()))
    assert all(parameter.grad is not None for parameter in student.parameters())
    images, _ = batch()
    twin = copy.deepcopy(student)
    assert torch.equal(twin.eval()(images, mode='tensor'), student.eval()(images, mode='tensor'))


def test_a_student_starts_from_its_teachers_weights(checkpoint):
    taught = build(csg_model(CSG, dict(checkpoint=checkpoint)))
    dense = build(dense_model())
    dense.load_state_dict(torch.load(checkpoint)['state_dict'])
    images, _ = batch()
    expected = dense.eval()(images, mode='tensor')
    assert torch.allclose(taught.eval()(images, mode='tensor'), expected, atol=1e-5)


def test_a_student_may_be_another_network(checkpoint):
    narrow = dense_model(base_channels=3)
    teacher = dict(checkpoint=checkpoint, model=dense_model())
    student = dict(narrow, type='TaughtModel', base_type=narrow['type'])
    assert losses(build({**student, 'teacher': teacher}))['loss_teacher_logits'].item() > 0
    with pytest.raises(CSGError, match=r'gives \(6, 4, 16, 16\) in the teacher and \(6, 3, 16, 16\) in the student'):
        losses(build({**student, 'teacher': dict(teacher, features=1.0, layers=BLOCKS)}))


# --- dense weights that fade out ---


def test_the_dense_weights_fade_out_along_the_training(checkpoint, progress):
    student = build(csg_model(CSG, dict(checkpoint=checkpoint, anneal=0.5)))
    dense = torch.load(checkpoint)['state_dict']
    name, conv = next(generated_convs(student))
    for step, share in ((1, 0.1), (3, 0.3), (4, 0.4)):
        progress(step, of=20)
        losses(student)
        assert conv.blend[1] == pytest.approx(share)
        assert torch.equal(conv.blend[0], dense[f'{name}.weight'])
    progress(10, of=20)
    losses(student)
    assert all(conv.blend is None for _, conv in generated_convs(student))


def test_a_blend_starts_as_the_dense_network(checkpoint, progress):
    student = build(csg_model({**CSG, 'code_dim': 1}, dict(checkpoint=checkpoint, anneal=1.0, features=1.0)))
    progress(1, of=10**6)
    assert losses(student)['loss_teacher_features'].item() < 0.2 * _features_without_blend(checkpoint)


def _features_without_blend(checkpoint) -> float:
    student = build(csg_model({**CSG, 'code_dim': 1}, dict(checkpoint=checkpoint, features=1.0)))
    return losses(student)['loss_teacher_features'].item()


# --- segmentation ---


def test_pixels_and_channels_of_a_segmentation_network(tmp_path):
    from mmengine.structures import PixelData
    from mmseg.structures import SegDataSample

    base = Config.fromfile('configs/demo/deeplabv3_r18-d8-w32_drawn-voc-80x80.py').model.to_dict()
    init_default_scope('mmseg')
    dense = MODELS.build(copy.deepcopy(base))
    torch.save({'state_dict': dense.state_dict()}, tmp_path / 'dense.pth')
    factors = dict(features=1.0, channels=1.0, layers=['backbone.layer*.*', 'decode_head.bottleneck'])
    teacher = dict(checkpoint=str(tmp_path / 'dense.pth'), **factors)
    csg = dict(slice_shape=(16, 16, 3, 3), code_dim=16)
    student = MODELS.build({**base, 'type': 'CSGModel', 'base_type': base['type'], 'csg': csg, 'teacher': teacher})
    student.init_weights()
    truth = SegDataSample(gt_sem_seg=PixelData(data=torch.zeros(1, 48, 48, dtype=torch.long)))
    found = student.train()(inputs=torch.randn(2, 3, 48, 48), data_samples=[truth, truth], mode='loss')
    taught = {name: value for name, value in found.items() if name.startswith('loss_teacher')}
    assert set(taught) == {'loss_teacher_logits', 'loss_teacher_channels', 'loss_teacher_features'}
    assert all(torch.isfinite(value) and value > 0 for value in taught.values())


# --- through the Runner ---


@pytest.fixture(scope='module')
def images(tmp_path_factory):
    """A file of images whose brightness tells the class."""
    rng = np.random.default_rng(0)
    labels = np.arange(48) % 10
    pixels = (rng.uniform(0, 40, (48, 32, 32, 3)) + 20 * labels[:, None, None, None]).astype(np.uint8)
    folder = tmp_path_factory.mktemp('images')
    np.savez(folder / 'images.npz', x_train=pixels, y_train=labels, x_test=pixels, y_test=labels)
    return folder


@pytest.fixture
def runner(images):
    """Build a Runner that trains on them."""

    def build_runner(model, work_dir, epochs=2, **more) -> Runner:
        work_dir.mkdir(exist_ok=True)
        common = dict(data_root=str(images), ann_file='images.npz', split='train', pipeline=[dict(type='PackInputs')])
        loader = dict(
            batch_size=12,
            sampler=dict(type='DefaultSampler', shuffle=True),
            dataset=dict(type='NPZDataset', metainfo=dict(classes=tuple('abcdefghij')), **common),
        )
        settings = dict(
            model=model,
            default_scope='mmpretrain',
            work_dir=str(work_dir),
            train_dataloader=loader,
            train_cfg=dict(by_epoch=True, max_epochs=epochs),
            optim_wrapper=dict(optimizer=dict(type='SGD', lr=0.01, momentum=0.9)),
            default_hooks=dict(csg=dict(type='CSGHook'), checkpoint=dict(type='CheckpointHook', interval=1)),
            custom_hooks=[dict(type='ExactResumeHook')],
            randomness=dict(seed=0),
            experiment_name=f'{work_dir.parent.name}-{work_dir.name}',
        )
        return Runner.from_cfg(Config({**settings, **more}))

    return build_runner


def weights(tmp_path, epoch) -> dict:
    return torch.load(tmp_path / f'epoch_{epoch}.pth', weights_only=False)['state_dict']


def assert_equal(ours: dict, theirs: dict) -> None:
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert torch.equal(ours[name], theirs[name]), name


def test_a_run_that_stopped_while_weights_fade_ends_with_the_same_weights(checkpoint, runner, tmp_path):
    teacher = dict(checkpoint=checkpoint, labels=0.0, features=1.0, anneal=0.8, layers=BLOCKS)
    whole, broken = tmp_path / 'whole', tmp_path / 'broken'
    runner(csg_model(CSG, teacher), whole).train()
    assert not any('teacher' in name or name.endswith('conv1.weight') for name in weights(whole, 1) if 'layer' in name)
    broken.mkdir()
    (broken / 'last_checkpoint').write_text(str(whole / 'epoch_1.pth'))
    resumed = runner(csg_model(CSG, teacher), broken, resume=True)
    resumed.train()
    assert_equal(weights(broken, 2), weights(whole, 2))
    log = next(broken.rglob('*.log')).read_text()
    assert 'CSG: fitted' not in log
    assert 'CSG: fitted' in next(whole.rglob('*.log')).read_text()


@pytest.mark.parametrize('door', ['load_from', 'init_cfg', 'backbone', 'hook'])
def test_every_door_fits_a_dense_checkpoint(door, checkpoint, runner, tmp_path):
    dense = torch.load(checkpoint)['state_dict']
    pretrained = dict(type='Pretrained', checkpoint=checkpoint)
    model, more = csg_model(CSG), {}
    if door == 'init_cfg':
        model['init_cfg'] = pretrained
    elif door == 'backbone':
        model['backbone']['init_cfg'] = {**pretrained, 'prefix': 'backbone.'}
    else:
        more['load_from'] = checkpoint
    if door == 'hook':
        model = dense_model()
        more['default_hooks'] = dict(csg=dict(type='CSGHook', csg=CSG))
    still = dict(optimizer=dict(type='SGD', lr=0.0))
    run = runner(model, tmp_path / door, epochs=1, optim_wrapper=still, **more)
    run.train()
    assert find_bank(run.model) is not None
    plain = materialise(run.model).state_dict()
    for name, tensor in dense.items():
        if name.endswith('.weight') and tensor.ndim == 4:
            assert torch.allclose(plain[name], tensor, atol=1e-5), name


def test_a_run_does_not_resume_from_a_dense_checkpoint(checkpoint, runner, tmp_path):
    with pytest.raises(CSGError, match='would resume from a dense checkpoint'):
        runner(csg_model(CSG), tmp_path / 'run', load_from=checkpoint, resume=True).train()


def test_the_proximal_hook_brings_weights_nearer_to_generated_ones(checkpoint, runner, tmp_path):
    distances = []
    for strength in (1e-9, 0.5):
        proximal = dict(type='ProximalHook', csg=CSG, strength=strength, interval=3)
        run = runner(dense_model(), tmp_path / str(strength), default_hooks=dict(proximal=proximal))
        run.train()
        student = build(csg_model(CSG))
        student.load_state_dict(run.model.state_dict())
        dense = dict(run.model.named_parameters())
        distances.append(
            sum(
                ((conv.generate_weight() - dense[f'{name}.weight']).norm() / dense[f'{name}.weight'].norm()).item()
                for name, conv in generated_convs(student)
            )
        )
    assert distances[1] < 0.7 * distances[0]


def test_the_proximal_hook_names_weights_that_are_not_finite(runner, tmp_path):
    proximal = dict(type='ProximalHook', csg=CSG)
    run = runner(dense_model(), tmp_path, default_hooks=dict(proximal=proximal))
    run.model.backbone.layer1[0].conv1.weight.data[0, 0, 0, 0] = float('nan')
    with pytest.raises(CSGError, match=r'backbone.layer1.0.conv1.weight holds NaN or infinite'):
        run.train()


def test_all_processes_share_a_fit_by_hand_too(checkpoint, monkeypatch):
    shared = []
    monkeypatch.setattr('csg_seg.mm.model.broadcast', lambda tensor: shared.append(tensor))
    student = build(csg_model(CSG))
    assert fit(student, torch.load(checkpoint)['state_dict']) == find_bank(student).fitted
    assert len(shared) == 1 + len(list(generated_convs(student)))


# --- bad input ---


@pytest.mark.parametrize(
    ('change', 'says'),
    [
        (dict(labels=-1), 'labels must not be negative'),
        (dict(anneal=1.5), 'anneal is a share of the training, from 0 to 1'),
        (dict(temperature=0), 'temperature must be above 0'),
        (
            dict(features=1.0, layers=['backbone.stage*']),
            r"pattern 'backbone.stage\*' names no module; there are backbone",
        ),
        (dict(logits_layer='head.nothing'), "has no layer 'head.nothing'"),
        (dict(features=1.0, layers=[]), 'layers is empty'),
        (dict(labels=0, logits=0), 'are all 0, so there is nothing to learn from'),
        (dict(logits='much'), "logits must be a number; got 'much'"),
        (dict(labels=float('nan')), 'labels must be a number; got nan'),
        (dict(logit=1.0), 'logit'),
    ],
)
def test_wrong_settings_of_a_teacher(change, says, checkpoint):
    with pytest.raises(CSGError, match=says):
        build(csg_model(CSG, dict(checkpoint=checkpoint, **change)))


def test_one_pattern_needs_no_list(checkpoint):
    network = build(csg_model(CSG, dict(checkpoint=checkpoint, features=1.0, layers='backbone.layer1.*')))
    assert losses(network)['loss_teacher_features'].isfinite()


def test_a_layer_that_is_not_run_is_named(checkpoint):
    # A teacher computes no loss of its own.
    network = build(csg_model(CSG, dict(checkpoint=checkpoint, features=1.0, layers='head.loss_module')))
    with pytest.raises(CSGError, match="layer 'head.loss_module' was not run by itself in the teacher; name a module"):
        losses(network)


def test_a_start_of_ones_own_is_kept(checkpoint, tmp_path):
    torch.manual_seed(5)
    other = materialise(build(csg_model(CSG | {'seed': 3})))
    torch.save({'state_dict': other.state_dict()}, tmp_path / 'other.pth')
    init_cfg = dict(type='Pretrained', checkpoint=str(tmp_path / 'other.pth'))
    student = build({**csg_model(CSG, dict(checkpoint=checkpoint)), 'init_cfg': init_cfg})
    for name, conv in generated_convs(student):
        assert torch.allclose(conv.generate_weight(), other.get_submodule(name).weight, atol=1e-4), name


def test_a_teacher_without_a_checkpoint():
    with pytest.raises(CSGError, match='checkpoint'):
        build(csg_model(CSG, dict(logits=1.0)))


def test_a_teacher_of_another_architecture(tmp_path, checkpoint):
    other = build(dense_model(base_channels=3))
    torch.save({'state_dict': other.state_dict()}, tmp_path / 'other.pth')
    with pytest.raises(CSGError, match=r"another network's: backbone.layer1.0.conv1.weight is \(3, 3, 3, 3\)"):
        build(csg_model(CSG, dict(checkpoint=str(tmp_path / 'other.pth'))))
