"""One network starts with the trained generators of another."""

import copy
import math

import pytest
import torch
from conftest import run_tool
from mmengine.registry import HOOKS
from mmengine.runner import Runner
from odd_network import Net
from small_runs import CSG, SETTINGS, hook_door, small_config, train
from torch import nn
from torchvision.models import resnet18

import experiments.rivals.tensor_ring  # noqa: F401 (registers a kind that is not part of the package)
from csg_seg import fit, load_generators, retrofit, save_compact
from csg_seg.errors import CSGError
from csg_seg.layers.bank import find_bank
from csg_seg.layers.conv import generated_convs, kaiming_std
from csg_seg.mm.checkpoints.descriptions import describe
from csg_seg.mm.checkpoints.reading import read_checkpoint
from csg_seg.mm.model import build_model

SMALL = {'slice_shape': (16, 16, 3, 3), 'code_dim': 32, 'seed': 3}
NARROW = {'generator': 'binary', 'slice_shape': (8, 8, 3, 3), 'code_dim': 8}
KINDS = [SMALL, SMALL | {'generator': 'mlp', 'hidden': 8}, SMALL | {'generator': 'binary'}, [SMALL, NARROW]]


def split(csg):
    """Give several dicts layers of their own."""
    return csg if isinstance(csg, dict) else [csg[0] | {'exclude': ['layer4']}, csg[1] | {'include': ['layer4']}]


def learned(csg):
    """Return a wide network whose generators are not at their start values any more."""
    model = retrofit(resnet18(num_classes=7), split(csg))
    with torch.no_grad():
        for parameter in find_bank(model).parameters():
            parameter.mul_(1.7).add_(0.01)
    return model.state_dict()


def other(csg, **change):
    dicts = [each | change for each in (split(csg) if isinstance(csg, list) else [csg])]
    return retrofit(resnet18(num_classes=3), dicts)


@pytest.mark.parametrize('csg', KINDS, ids=str)
def test_generators_are_the_others_and_weights_start_at_kaiming_variance(csg):
    weights = learned(csg)
    model = other(csg)
    load_generators(model, weights)
    for name, tensor in find_bank(model).state_dict().items():
        assert torch.equal(tensor, weights[f'csg.{name}']), name
    for name, conv in generated_convs(model):
        std = conv.generate_weight().std().item()
        if 'mlp' not in str(csg):  # its variance is that of its linear part
            assert std == pytest.approx(kaiming_std(conv), rel=0.15), name


def test_a_binary_generator_is_the_others_by_its_seed():
    weights = learned(SMALL | {'generator': 'binary', 'seed': 11})
    model = other(SMALL | {'generator': 'binary', 'seed': 4})
    load_generators(model, weights)
    twin = other(SMALL | {'generator': 'binary', 'seed': 11})
    assert torch.equal(find_bank(model)[0].weight, find_bank(twin)[0].weight)


def test_another_architecture_is_fitted_by_a_frozen_generator_of_the_first():
    weights = learned(SMALL)
    dense = Net(seed=5)
    trained = copy.deepcopy(dense.state_dict())
    model = retrofit(dense, SMALL | {'freeze_generator': True})
    load_generators(model, weights)
    errors = fit(model, trained)
    assert torch.equal(find_bank(model)[0].weight, weights['csg.0.weight'])
    assert 0 < max(errors.values()) < 1
    assert not find_bank(model)[0].weight.requires_grad


@pytest.mark.parametrize('kind', [{}, {'generator': 'mlp', 'hidden': 8}, {'generator': 'tensor_ring', 'rank': 3}])
def test_a_fit_keeps_loaded_generators_though_they_will_train(kind):
    csg = {'slice_shape': (12, 20, 3, 3), 'code_dim': 24} | kind
    first = retrofit(Net(seed=1), csg)
    nn.init.normal_(find_bank(first)[0].weight, std=0.3)
    weights = first.state_dict()
    model = retrofit(Net(seed=2), csg)
    load_generators(model, weights)
    before = [conv.code.detach().clone() for _, conv in generated_convs(model)]
    fit(model, Net(seed=3).state_dict())
    for name, tensor in find_bank(model).state_dict().items():
        assert torch.equal(tensor, weights[f'csg.{name}']), name
    assert all(parameter.requires_grad for parameter in find_bank(model).parameters())
    assert not any(torch.equal(conv.code, code) for (_, conv), code in zip(generated_convs(model), before, strict=True))


def refusals():
    weights = learned(SMALL)
    spoiled = {**weights, 'csg.0.weight': torch.full_like(weights['csg.0.weight'], math.nan)}
    return {
        'no generator': (SMALL, resnet18().state_dict(), 'there is no generator in these weights'),
        'other code length': (SMALL | {'code_dim': 16}, weights, 'code_dim'),
        'other kind': (SMALL | {'generator': 'binary'}, weights, 'generator'),
        'too few': ([SMALL, NARROW], weights, 'hold 1 generators, this network has 2'),
        'other shape': (
            SMALL,
            {**weights, 'csg.0.weight': torch.ones(3, 3)},
            r'csg.0.weight: the checkpoint holds \(3, 3\)',
        ),
        'half of it': (
            SMALL,
            {'csg.0.weight': weights['csg.0.weight']},
            r'the checkpoint lacks csg.0._extra_state; a compact file is read by csg_seg.load_compact\(path, model\); '
            'for other files, take the weights of a whole CSG network',
        ),
        'no state dict': (SMALL, {'state_dict': weights}, "give its entry 'state_dict'"),
        'a path': (SMALL, 'trained.pth', 'load_generators needs a dict of tensors'),
        'not finite': (SMALL, spoiled, 'csg.0.weight holds NaN or infinite values'),
    }


@pytest.mark.parametrize('name', refusals())
def test_other_generators_are_refused_and_change_nothing(name):
    csg, weights, said = refusals()[name]
    model = other(csg)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(CSGError, match=said):
        load_generators(model, weights)
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())


def test_a_dense_model_is_refused():
    with pytest.raises(CSGError, match=r'load_generators: the model is not retrofitted; call csg_seg\.retrofit'):
        load_generators(resnet18(), learned(SMALL))


@pytest.fixture
def elsewhere(tmp_path):
    """A compact file of another network, with a generator as the config's."""
    model = retrofit(resnet18(num_classes=7), SETTINGS)
    with torch.no_grad():
        find_bank(model)[0].weight.mul_(1.3)
    save_compact(model, tmp_path / 'elsewhere.safetensors')
    return tmp_path / 'elsewhere.safetensors'


def frozen(drawn, tmp_path, path, door: str):
    if door == 'model':
        options = {'model.csg.freeze_generator': True, 'model.generators_from': str(path)}
        return small_config(CSG, drawn, tmp_path / 'run', **options)
    cfg = small_config(CSG.with_name(CSG.name.removeprefix('csg-s16-d128_')), drawn, tmp_path / 'run')
    hook_door(cfg, generators_from=str(path))
    cfg.default_hooks.csg.csg.freeze_generator = True
    return cfg


@pytest.mark.parametrize('door', ['model', 'hook'])
def test_only_codes_train_with_a_frozen_generator_from_elsewhere(drawn, tmp_path, elsewhere, door):
    cfg = frozen(drawn, tmp_path, elsewhere, door)
    runner = train(cfg)
    generator = read_checkpoint(elsewhere)['state_dict']['csg.0.weight']
    bank = find_bank(runner.model)
    assert torch.equal(bank[0].weight, generator)
    held = runner.optim_wrapper.optimizer.state
    assert bank[0].weight not in held and next(iter(bank.layers.values())).code in held
    elsewhere.unlink()  # testing, showing, resuming need it no more
    checkpoint = tmp_path / 'run' / 'iter_3.pth'
    resumed = frozen(drawn, tmp_path, elsewhere, door)
    resumed.merge_from_dict({'resume': True, 'load_from': str(checkpoint), 'train_cfg.max_iters': 4})
    again = Runner.from_cfg(resumed)
    again.train()
    assert torch.equal(find_bank(again.model)[0].weight, generator)


def test_compact_checkpoints_do_not_contain_the_path(drawn, tmp_path, elsewhere):
    cfg = frozen(drawn, tmp_path, elsewhere, 'model')
    assert 'elsewhere' not in str(describe(cfg))
    assert find_bank(build_model(cfg)) is not None


def test_the_hook_takes_no_generators_for_a_model_of_its_own_settings():
    with pytest.raises(CSGError, match='generators_from goes with csg'):
        HOOKS.build(dict(type='CSGHook', generators_from='other.pth'))


def test_a_missing_file_is_named_before_training(drawn, tmp_path):
    cfg = frozen(drawn, tmp_path, tmp_path / 'none.pth', 'model')
    cfg.dump(tmp_path / 'config.py')
    done = run_tool('train.py', tmp_path / 'config.py', check=False)
    assert done.returncode == 1
    assert done.stderr.strip().splitlines()[-1].startswith(f'error: {tmp_path}/none.pth: no such file')


def test_other_generators_end_training_with_one_line(drawn, tmp_path):
    model = retrofit(resnet18(), SETTINGS | {'code_dim': 64})
    save_compact(model, tmp_path / 'other.safetensors')
    cfg = frozen(drawn, tmp_path, tmp_path / 'other.safetensors', 'model')
    cfg.dump(tmp_path / 'config.py')
    done = run_tool('train.py', tmp_path / 'config.py', check=False)
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith('error: generators_from: ') and 'code_dim' in last
