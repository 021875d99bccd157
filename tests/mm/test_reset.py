"""Training from a CSG checkpoint in mmengine: other classes, learning rates, and runs of earlier versions."""

import copy
import json
import logging

import pytest
import torch
from conftest import run_tool
from mmengine.optim import build_optim_wrapper
from mmengine.runner import Runner
from mmseg.apis import init_model
from small_runs import CSG, DENSE, SETTINGS, hook_door, small_config, train
from torch import nn

from csg_seg import CSGError, CSGWarning, retrofit
from csg_seg.layers.bank import find_bank
from csg_seg.mm.checkpoints.reading import read_checkpoint

# Heads are generated too: their last layers are convs of 1x1.
BOTH = [SETTINGS, {'slice_shape': (16, 16, 1, 1), 'code_dim': 16, 'include': ['*.conv_seg']}]
CLASSES = ('background', 'bird', 'boat', 'bottle', 'bus', 'car', 'cat')
HEADS = ['decode_head.conv_seg', 'auxiliary_head.conv_seg']
EMA = {'custom_hooks': [dict(type='EMAHook', momentum=0.5)]}


def config(drawn, work_dir, door, *, classes=None, reset=None, **options):
    if classes is not None:
        options |= {f'model.{head.split(".")[0]}.num_classes': len(classes) for head in HEADS}
        options |= {f'{split}_dataloader.dataset.metainfo': {'classes': classes} for split in ('train', 'val', 'test')}
    if door == 'hook':
        cfg = hook_door(small_config(DENSE, drawn, work_dir, **options), save_compact=True)
        cfg.default_hooks.csg.update(csg=copy.deepcopy(BOTH), reset=reset)
        return cfg
    return small_config(CSG, drawn, work_dir, **{'model.csg': copy.deepcopy(BOTH), 'model.reset': reset, **options})


@pytest.fixture(scope='module')
def trained(drawn, tmp_path_factory):
    folder = tmp_path_factory.mktemp('trained')
    train(config(drawn, folder, 'model', **{'default_hooks.csg.save_compact': True}))
    return folder


@pytest.mark.parametrize(('door', 'suffix'), [('model', '.safetensors'), ('hook', '.pth')])
def test_training_continues_with_other_classes(drawn, trained, tmp_path, door, suffix, caplog):
    path = str(trained / f'iter_3{suffix}')
    still = {'optim_wrapper.optimizer.lr': 0.0, 'param_scheduler.0.eta_min': 0.0, 'model.backbone.norm_eval': True}
    cfg = config(drawn, tmp_path, door, classes=CLASSES, reset=HEADS, load_from=path, **EMA, **still)
    cfg.log_level = 'INFO'
    logging.getLogger('mmengine').propagate = True
    runner = train(cfg)
    old, new = read_checkpoint(path)['state_dict'], runner.model.state_dict()
    assert len(new['decode_head.conv_seg.bias']) == 7 and len(old['decode_head.conv_seg.bias']) == 21
    for name in ('backbone.layer4.1.conv2.code', 'csg.0.weight', 'csg.1.weight'):
        assert torch.equal(new[name], old[name])
    assert find_bank(runner.model).reset.layers == tuple(sorted(HEADS, reverse=True))
    assert (tmp_path / 'iter_3.safetensors').is_file()
    (log,) = tmp_path.glob('*/*.log')
    assert 'does not fit decode_head.conv_seg, auxiliary_head.conv_seg' in log.read_text()
    # The result is complete: it is tested without the reset that training needed, and so is the average.
    testing = config(drawn, tmp_path, door, classes=CLASSES, load_from=str(tmp_path / 'iter_3.pth'), **EMA)
    assert 'mIoU' in Runner.from_cfg(testing).test()


@pytest.mark.parametrize('door', ['model', 'hook'])
def test_a_test_resets_no_layer(drawn, trained, tmp_path, door):
    cfg = config(drawn, tmp_path, door, classes=CLASSES, reset=HEADS, load_from=str(trained / 'iter_3.pth'))
    with pytest.raises(CSGError, match='conv_seg'):
        Runner.from_cfg(cfg).test()
    if door == 'model':
        with pytest.raises(CSGError, match='conv_seg'):
            init_model(cfg, str(trained / 'iter_3.pth'), device='cpu')


@pytest.mark.parametrize('door', ['model', 'hook'])
def test_without_the_option_other_classes_are_refused(drawn, trained, tmp_path, door):
    cfg = config(drawn, tmp_path, door, classes=CLASSES, load_from=str(trained / 'iter_3.pth'))
    with pytest.raises(CSGError, match='conv_seg.* name the layer in reset'):
        train(cfg)


def test_more_generated_layers_than_the_config_has_are_refused_everywhere(drawn, trained, tmp_path):
    fewer = [{**SETTINGS, 'exclude': ['backbone.layer4']}, BOTH[1]]
    for path in (str(trained / 'iter_3.pth'), str(trained / 'iter_3.safetensors')):
        by_model = {'model.csg': fewer, 'load_from': path}
        with pytest.raises(CSGError, match='is generated in the checkpoint and dense in this model'):
            Runner.from_cfg(small_config(CSG, drawn, tmp_path, **by_model)).test()
        with pytest.raises(CSGError, match='is generated in the checkpoint and dense in this model'):
            train(small_config(CSG, drawn, tmp_path, **by_model))
        with pytest.raises(CSGError, match='is generated in the checkpoint and dense in this model'):
            init_model(small_config(CSG, drawn, tmp_path, **{'model.csg': fewer}), path, device='cpu')
        by_hook = hook_door(small_config(DENSE, drawn, tmp_path, load_from=path))
        by_hook.default_hooks.csg.csg = fewer
        with pytest.raises(CSGError, match='is generated in the checkpoint and dense in this model'):
            Runner.from_cfg(by_hook).test()


def test_a_hook_that_no_runner_runs_leaves_no_network_random(drawn, trained, tmp_path):
    cfg = hook_door(small_config(DENSE, drawn, tmp_path))
    with pytest.raises(CSGError, match='CSGHook, which init_model does not run'):
        init_model(cfg, str(trained / 'iter_3.pth'), device='cpu')


def test_patterns_are_checked_before_training(drawn, trained, tmp_path):
    cfg = config(drawn, tmp_path, 'model', classes=CLASSES, reset='head', load_from=str(trained / 'iter_3.pth'))
    cfg.dump(tmp_path / 'config.py')
    done = run_tool('train.py', tmp_path / 'config.py', check=False)
    assert done.returncode == 1
    assert done.stderr.strip().splitlines()[-1].startswith("error: reset pattern 'head' names no layer of the model")


# --- rates ---


def warnings_of(runner_cfg, recwarn):
    recwarn.clear()
    train(runner_cfg)
    return [str(each.message) for each in recwarn if issubclass(each.category, CSGWarning)]


@pytest.mark.parametrize(
    ('door', 'keys', 'says'),
    [
        ('model', {'backbone': dict(lr_mult=0.1)}, 'at a lower learning rate'),
        ('hook', {'backbone': dict(lr_mult=0.0)}, 'at a learning rate of 0'),
        ('model', {'backbone': dict(decay_mult=0.0)}, 'less weight decay'),
        ('hook', {'csg': dict(lr_mult=0.0)}, 'its learning rate is 0'),
    ],
)
def test_rates_that_the_generator_overrides_are_warned_about_once(drawn, tmp_path, recwarn, door, keys, says):
    options = {'optim_wrapper.paramwise_cfg': dict(custom_keys=keys)}
    (told,) = warnings_of(config(drawn, tmp_path, door, **options), recwarn)
    assert says in told and 'backbone.layer1' in told


def test_stages_that_freeze_in_train_are_warned_about(drawn, tmp_path, recwarn):
    cfg = config(drawn, tmp_path, 'model')
    runner = Runner.from_cfg(cfg)
    runner.model.backbone.frozen_stages = 2  # ResNet freezes these whenever it is set to train
    recwarn.clear()
    runner.train()
    (told,) = [str(each.message) for each in recwarn if issubclass(each.category, CSGWarning)]
    assert 'frozen (backbone.stem.3, backbone.stem.6, backbone.layer1.0.conv1' in told and 'learning rate' not in told


def test_plain_training_warns_of_nothing(drawn, tmp_path, recwarn):
    heads = {'optim_wrapper.paramwise_cfg': dict(custom_keys={'head': dict(lr_mult=10.0)})}
    assert not warnings_of(config(drawn, tmp_path, 'model', **heads), recwarn)


def test_the_bias_of_an_mlp_generator_is_a_bias():
    csg = {'slice_shape': (8, 8, 3, 3), 'code_dim': 8, 'generator': 'mlp', 'hidden': 4}
    net = retrofit(nn.ModuleDict({'net': nn.Sequential(nn.Conv2d(3, 16, 3), nn.Conv2d(16, 16, 3))}), csg)
    settings = dict(type='OptimWrapper', optimizer=dict(type='SGD', lr=1.0, weight_decay=0.1))

    def decays(**paramwise):
        built = build_optim_wrapper(net, {**settings, 'paramwise_cfg': paramwise}).optimizer
        names = {id(parameter): name for name, parameter in net.named_parameters()}
        return {names[id(group['params'][0])]: (group['lr'], group['weight_decay']) for group in built.param_groups}

    found = decays(bias_decay_mult=0.0, bias_lr_mult=2.0)
    assert found['csg.0.hidden_bias'] == found['net.1.bias'] == (2.0, 0.0)
    assert found['csg.0.hidden_weight'] == found['net.1.code'] == (1.0, 0.1)
    named = decays(bias_decay_mult=0.0, custom_keys={'hidden_bias': dict(decay_mult=3.0)})
    assert named['csg.0.hidden_bias'][1] == pytest.approx(0.3) and named['net.1.bias'][1] == 0


# --- runs of earlier versions ---


@pytest.mark.parametrize(
    ('door', 'paramwise'), [('model', None), ('hook', dict(custom_keys={'head': dict(lr_mult=10.0)}))]
)
def test_a_run_of_an_earlier_version_resumes(drawn, tmp_path, door, paramwise):
    quiet = {'model.decode_head.dropout_ratio': 0, 'model.auxiliary_head.dropout_ratio': 0}
    options = {**quiet, 'optim_wrapper.paramwise_cfg': paramwise, 'default_hooks.checkpoint.interval': 2}
    whole = train(config(drawn, tmp_path / 'whole', door, iters=4, **options)).model.state_dict()
    checkpoint = torch.load(tmp_path / 'whole' / 'iter_2.pth', weights_only=False)
    # As 0.1.0 wrote it: the generators' parameters last, and no word of the layers.
    for name in [name for name in checkpoint['state_dict'] if name.endswith('_extra_state')]:
        meaning = json.loads(bytes(map(int, checkpoint['state_dict'][name].tolist())))
        del meaning['layers'], meaning['crc32']
        checkpoint['state_dict'][name] = torch.frombuffer(bytearray(json.dumps(meaning).encode()), dtype=torch.uint8)
    groups = checkpoint['optimizer']['param_groups']
    if paramwise is None:
        groups[0]['params'] = [*groups[0]['params'][2:], *groups[0]['params'][:2]]
    else:
        groups[:] = [*groups[2:], *groups[:2]]
    (tmp_path / 'run').mkdir()
    torch.save(checkpoint, tmp_path / 'run' / 'iter_2.pth')
    (tmp_path / 'run' / 'last_checkpoint').write_text(str(tmp_path / 'run' / 'iter_2.pth'))
    again = config(drawn, tmp_path / 'run', door, iters=4, **options)
    if door == 'model':
        again.default_hooks.csg = dict(type='CSGHook')
    again.resume = True
    resumed = train(again).model.state_dict()
    assert all(torch.equal(whole[name], tensor) for name, tensor in resumed.items())


def test_a_compiled_run_that_reset_a_layer_validates(drawn, tmp_path):
    train(small_config(CSG, drawn, tmp_path, iters=1, **{'default_hooks.checkpoint.interval': 1}))
    options = {'model.decode_head.num_classes': 30, 'model.reset': ['decode_head.conv_seg']}
    options |= {'load_from': str(tmp_path / 'iter_1.pth'), 'compile': {'backend': 'eager'}}
    runner = train(small_config(CSG, drawn, tmp_path / 'more', iters=2, **options, **{'train_cfg.val_interval': 1}))
    assert runner.iter == 2 and not find_bank(runner.model).reset.is_on
