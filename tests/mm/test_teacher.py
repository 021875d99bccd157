"""A dense network teaches a generated one: losses, settings, and the fit of its weights through every door."""

import copy

import mmseg.models  # noqa: F401 (registers EncoderDecoder)
import pytest
import timm
import torch
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope
from small_classifier import (
    CSG,
    batch,
    build,
    build_runner,
    csg_model,
    dense_model,
    save_dense_network,
    save_images,
)
from torch import nn

from csg_seg import fit, materialise
from csg_seg.distillation import divergence
from csg_seg.errors import CSGError
from csg_seg.layers.bank import find_bank
from csg_seg.layers.conv import generated_convs
from csg_seg.mm.hooks.csg import CSGHook

BLOCKS = ['backbone.layer*.*']


@pytest.fixture(scope='module')
def checkpoint(tmp_path_factory):
    return save_dense_network(tmp_path_factory.mktemp('dense') / 'dense.pth')


@pytest.fixture
def runner(tmp_path_factory):
    """Build a Runner that trains a model on a few images."""
    images = tmp_path_factory.mktemp('images') / 'images.npz'
    save_images(images)
    return lambda model, work_dir, **more: build_runner(images, model, work_dir, **more)


def losses(network) -> dict:
    images, samples = batch()
    return network(inputs=images, data_samples=samples, mode='loss')


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
    with pytest.raises(CSGError, match=r'is \(6, 4, 16, 16\) in the teacher and \(6, 3, 16, 16\) in the student'):
        losses(build({**student, 'teacher': dict(teacher, features=1.0, layers=BLOCKS)}))


# --- segmentation ---


def test_pixels_and_channels_of_a_segmentation_network(tmp_path):
    from mmengine.structures import PixelData
    from mmseg.structures import SegDataSample

    base = Config.fromfile('configs/demo/deeplabv3_r18-d8-w32_drawn-voc-64x64.py').model.to_dict()
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


def weights(tmp_path, epoch) -> dict:
    return torch.load(tmp_path / f'epoch_{epoch}.pth', weights_only=False)['state_dict']


def assert_equal(ours: dict, theirs: dict) -> None:
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert torch.equal(ours[name], theirs[name]), name


def test_a_taught_run_that_resumes_ends_with_the_same_weights(checkpoint, runner, tmp_path):
    teacher = dict(checkpoint=checkpoint, labels=0.0, features=1.0, layers=BLOCKS)
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


def timm_segmentor(checkpoint='') -> dict:
    """Return the config of an mmseg network whose backbone loads a checkpoint when it is built."""
    backbone = dict(type='TIMMBackbone', model_name='resnet10t', pretrained=False, checkpoint_path=str(checkpoint))
    head = dict(type='FCNHead', in_channels=512, channels=16, in_index=4, num_classes=3, norm_cfg=dict(type='BN'))
    return dict(type='EncoderDecoder', backbone=backbone, decode_head=head)


@pytest.fixture(scope='module')
def encoder(tmp_path_factory):
    """Return the path of a checkpoint of the backbone of :func:`timm_segmentor`."""
    path = tmp_path_factory.mktemp('encoder') / 'encoder.pth'
    torch.save(timm.create_model('resnet10t', features_only=True).state_dict(), path)
    return path


def build_segmentor(config: dict, csg: dict | None = None, **more) -> nn.Module:
    """Build an mmseg network, with CSG if settings are given."""
    init_default_scope('mmseg')
    generated = dict(type='CSGModel', base_type=config['type'], csg=csg) if csg else {}
    return MODELS.build(copy.deepcopy({**config, **generated, **more}))


@pytest.mark.parametrize('door', ['model', 'hook', 'frozen'])
def test_weights_that_a_backbone_is_built_with_are_fitted(door, encoder):
    config = timm_segmentor(encoder)
    dense = build_segmentor(config)
    csg = dict(ratio=2, freeze_generator=door == 'frozen')
    student = build_segmentor(config, csg if door != 'hook' else None)
    if door == 'hook':
        assert CSGHook(csg).retrofit(student)
    bank = find_bank(student)
    start = {name: tensor.clone() for name, tensor in bank.state_dict().items() if 'extra' not in name}
    student.init_weights()
    convs = dict(generated_convs(student))
    assert {*bank.loading.errors} == {name for name in convs if name.startswith('backbone')} != {*convs}
    for name, error in bank.loading.errors.items():
        weight = dense.get_submodule(name).weight
        assert error < 0.95
        assert ((convs[name].weight - weight).norm() / weight.norm()).item() == pytest.approx(error, rel=1e-4)
    for name, tensor in start.items():
        assert torch.equal(bank.state_dict()[name], tensor) == (door == 'frozen')
    assert not bank.loading.built_with
    fitted = copy.deepcopy(student.state_dict())
    student.init_weights()  # mmengine initialises once
    assert_equal(student.state_dict(), fitted)


def test_a_backbone_that_loads_nothing_is_not_fitted():
    student = build_segmentor(timm_segmentor(), dict(ratio=2))
    student.init_weights()
    assert not find_bank(student).loading.errors


def test_a_checkpoint_replaces_what_a_backbone_is_built_with(encoder, tmp_path):
    config, csg = timm_segmentor(encoder), dict(ratio=2)
    other = build_segmentor(timm_segmentor())
    torch.save(other.state_dict(), tmp_path / 'other.pth')
    student = build_segmentor(config, csg, init_cfg=dict(type='Pretrained', checkpoint=str(tmp_path / 'other.pth')))
    student.init_weights()
    wanted = build_segmentor(config, csg)
    fit(wanted, other.state_dict())
    assert_equal(student.state_dict(), wanted.state_dict())


def test_what_a_backbone_is_built_with_goes_if_nothing_is_fitted(encoder):
    resumed, tested, averaged = (build_segmentor(timm_segmentor(encoder), dict(ratio=2)) for _ in range(3))
    assert find_bank(averaged).loading.built_with and not find_bank(copy.deepcopy(averaged)).loading.built_with
    saved = averaged.state_dict()
    tested.load_state_dict(saved)  # as a test does, without init_weights
    assert_equal(tested.state_dict(), saved)
    find_bank(resumed).loading.fit_on_load = False
    resumed.init_weights()
    for network in (resumed, tested):
        assert not find_bank(network).loading.built_with and not find_bank(network).loading.errors


def test_a_backbone_is_built_with_weights_that_are_finite(encoder, tmp_path):
    weights = torch.load(encoder)
    weights['layer2.0.conv1.weight'][0] = torch.nan
    torch.save(weights, tmp_path / 'broken.pth')
    student = build_segmentor(timm_segmentor(tmp_path / 'broken.pth'), dict(ratio=2))
    with pytest.raises(CSGError, match=r'backbone\.timm_model\.layer2\.0\.conv1\.weight'):
        student.init_weights()


def test_a_run_does_not_resume_from_a_dense_checkpoint(checkpoint, runner, tmp_path):
    with pytest.raises(CSGError, match='would resume from a dense checkpoint'):
        runner(csg_model(CSG), tmp_path / 'run', load_from=checkpoint, resume=True).train()


def test_all_processes_share_a_fit_by_hand_too(checkpoint, monkeypatch):
    shared = []
    monkeypatch.setattr('csg_seg.mm.model.broadcast', lambda tensor: shared.append(tensor))
    student = build(csg_model(CSG))
    assert fit(student, torch.load(checkpoint)['state_dict']) == find_bank(student).loading.errors
    assert len(shared) == 1 + len(list(generated_convs(student)))


# --- bad input ---


@pytest.mark.parametrize(
    ('change', 'says'),
    [
        (dict(labels=-1), 'labels must not be negative'),
        (dict(anneal=0.5), "unknown key 'anneal'; it was removed in 0.3.0 .* delete the key"),
        (dict(temperature=0), 'temperature must be above 0'),
        (
            dict(features=1.0, layers=['backbone.stage*']),
            r"pattern 'backbone.stage\*' names no module; the nearest are backbone",
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
    with pytest.raises(
        CSGError, match="layer 'head.loss_module' is not called as a module in the teacher, or a checkpoint calls it"
    ):
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


def test_a_csg_checkpoint_is_no_teacher(tmp_path, checkpoint):
    file = tmp_path / 'csg.pth'
    torch.save({'state_dict': build(csg_model(CSG)).state_dict()}, file)
    student = build(csg_model(CSG, dict(checkpoint=str(file))))
    with pytest.raises(CSGError, match=r'^teacher: .*csg.pth is a CSG checkpoint, and this teacher is a dense network'):
        losses(student)
