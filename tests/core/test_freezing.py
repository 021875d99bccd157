"""train_only: what matches trains, everything else stays as it is."""

import pickle
from copy import deepcopy

import pytest
import torch
from safetensors import safe_open
from torch import nn
from torch.nn import functional as F
from two_convs import Net, batch, build

from csg_seg import CSGError, materialise, save_compact, train_only


def step(model):
    images, labels = batch()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9, weight_decay=0.1)
    model.train()
    for _ in range(2):
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()


def changes(model, before):
    return {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}


def snapshot(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


CODES = {'narrow.code', 'widen.code'}
STATISTICS = {'norm.running_mean', 'norm.running_var', 'norm.num_batches_tracked'}


@pytest.mark.parametrize(
    ('patterns', 'trained', 'changed'),
    [
        ('*.code', CODES, CODES),
        (['*.code', 'norm.*'], CODES | {'norm.weight', 'norm.bias'}, CODES | {'norm.weight', 'norm.bias'} | STATISTICS),
        (['csg.*', 'narrow.code'], {'csg.0.weight', 'narrow.code'}, {'csg.0.weight', 'narrow.code'}),
    ],
)
@pytest.mark.parametrize('copy', [lambda model: model, deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
@pytest.mark.filterwarnings('ignore::csg_seg.CSGWarning')  # layers share the generator, which is the point
def test_only_what_matches_changes(patterns, trained, changed, copy):
    model = build()
    assert set(train_only(model, patterns)) == trained
    model = copy(model)
    before = snapshot(model)
    step(model)
    assert changes(model, before) == changed


def test_an_update_holds_what_trained(tmp_path):
    base, update = tmp_path / 'base.safetensors', tmp_path / 'update.safetensors'
    model = build()
    save_compact(model, base)
    train_only(model, '*.code')
    step(model)
    save_compact(model, update, base=base)
    with safe_open(str(update), framework='pt') as file:
        assert set(file.keys()) == CODES


def test_a_tied_parameter_has_several_names():
    model = build()
    model.aux = nn.Linear(31, 4)
    model.aux.weight = model.head.weight
    model.again = model.norm
    assert train_only(model, 'aux.*') == ['head.weight', 'aux.bias']
    assert train_only(model, 'again.*') == ['norm.weight', 'norm.bias']


def test_frozen_generators_stay_frozen():
    model = build(freeze_generator=True)
    assert 'csg.0.weight' not in train_only(model, '*')


def test_norms_that_are_converted_to_syncbn_stay_frozen():
    model = build()
    train_only(model, '*.code')
    before = snapshot(model)
    model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    assert isinstance(model.norm, nn.SyncBatchNorm)
    model.norm.__class__ = nn.BatchNorm2d  # which needs no GPU
    step(model)
    assert changes(model, before) == CODES


def test_dense_networks_too():
    model = Net()
    assert train_only(model, ['head.*']) == ['head.weight', 'head.bias']
    before = snapshot(model)
    step(model)
    assert changes(model, before) == {'head.weight', 'head.bias'}


def test_training_goes_on_as_before_for_batch_norms_that_train():
    model, twin = build(), build()
    train_only(model, '*')
    for each in (model, twin):
        step(each)
    assert not changes(model, snapshot(twin))


def test_what_was_frozen_can_train_again():
    model, twin = build(), build()
    train_only(model, '*.code')
    train_only(model, ['*.code', 'csg.*'])
    model.norm.requires_grad_(True)  # by hand
    before = snapshot(model)
    step(model)
    assert changes(model, before) >= STATISTICS
    model.load_state_dict(twin.state_dict())
    train_only(model, '*')
    for each in (model, twin):
        step(each)
    assert not changes(model, snapshot(twin))


def test_norms_that_train_again_do_so_without_another_call_of_train():
    model, twin = build().train(), build().train()
    train_only(model, '*.code')
    model(batch()[0])
    assert not model.norm.training
    model.load_state_dict(twin.state_dict())
    train_only(model, '*')
    for each in (model, twin):
        each(batch()[0])
    assert model.norm.training and torch.equal(model.norm.running_mean, twin.norm.running_mean)
    train_only(model, '*.code')
    model(batch()[0])
    train_only(model.eval(), '*')
    assert not model.norm.training


@pytest.mark.parametrize('norm', [nn.BatchNorm2d(16, affine=False), nn.InstanceNorm2d(16, track_running_stats=True)])
def test_norms_without_parameters_train_only_if_everything_does(norm):
    for patterns, moves in (('0.*', False), ('*', True)):
        model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), norm, nn.Conv2d(16, 4, 3))
        train_only(model, patterns)
        before = norm.running_mean.clone()
        model.train()(batch()[0])
        assert torch.equal(norm.running_mean, before) != moves


def test_what_is_no_network_is_named():
    with pytest.raises(CSGError, match='train_only.*: the model is an object of type str, not a module'):
        train_only('net', '*')
    with pytest.raises(CSGError, match='materialise.*: the model is an object of type int, not a module'):
        materialise(5)


@pytest.mark.parametrize(
    ('patterns', 'says'),
    [
        ('*.codes', "'\\*.codes' matches no parameter; the nearest are"),
        (3, 'give patterns of parameter names'),
        ([], 'give patterns of parameter names'),
    ],
)
def test_mistakes_are_refused_and_nothing_changes(patterns, says):
    model = build()
    with pytest.raises(CSGError, match=says):
        train_only(model, patterns)
    assert all(parameter.requires_grad for parameter in model.parameters())
    before = snapshot(model)
    step(model)
    assert changes(model, before) >= STATISTICS
