"""CSGModel (the model door) and CSGHook (the hook door) in mmengine's Runner."""

import copy

import numpy as np
import pytest
import torch
from mmengine.registry import MODELS, init_default_scope
from mmengine.runner import FlexibleRunner, Runner
from mmseg.apis import MMSegInferencer, inference_model, init_model
from small_runs import CSG, DENSE, SETTINGS, hook_door, small_config, train
from torch import nn

from csg_seg import summarise
from csg_seg.errors import CSGError
from csg_seg.layers.bank import find_bank
from csg_seg.layers.conv import CSGConv
from csg_seg.mm.checkpoints.reading import read_checkpoint
from csg_seg.mm.model import build_model


@pytest.fixture
def small(drawn, tmp_path):
    return lambda path, **options: small_config(path, drawn, tmp_path, **options)


def test_model_door_builds_the_inherited_type(small):
    init_default_scope('mmseg')
    cfg = small(CSG)
    model = MODELS.build(cfg.model)
    assert type(model).__name__ == 'EncoderDecoder'
    assert model.backbone.layer1[0].conv1.code.shape == (1, 128)
    assert 'csg' in model._modules and find_bank(model) not in model.children()
    assert cfg.model.backbone.type == 'ResNetV1c'


def test_a_config_may_have_no_hooks(small):
    cfg = small(CSG)
    cfg.default_hooks = cfg.custom_hooks = None
    assert find_bank(build_model(cfg)) is not None


def test_cfg_options_reach_the_generator(small):
    init_default_scope('mmseg')
    model = MODELS.build(small(CSG, **{'model.csg.code_dim': 32, 'model.csg.exclude': ['auxiliary_head']}).model)
    (generator,) = summarise(model).generators
    assert generator.code_dim == 32
    assert not isinstance(model.auxiliary_head.convs[0].conv, CSGConv)


@pytest.mark.parametrize('csg', [None, SETTINGS])
def test_model_door_names_the_missing_argument(csg):
    with pytest.raises(CSGError, match='base_type={{_base_.model.type}}'):
        MODELS.build(dict(type='CSGModel', csg=csg))


def test_model_door_refuses_itself_as_base():
    with pytest.raises(CSGError, match='override only model.csg'):
        MODELS.build(dict(type='CSGModel', base_type='CSGModel', csg=SETTINGS))


def test_both_doors_end_with_the_same_weights_and_schedule(small):
    by_model = train(small(CSG))
    by_hook = train(hook_door(small(DENSE)))
    ours, theirs = by_model.model.state_dict(), by_hook.model.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert by_model.optim_wrapper.get_lr() == by_hook.optim_wrapper.get_lr()
    assert summarise(by_hook.model).stored_params == sum(
        parameter.numel() for group in by_hook.optim_wrapper.param_groups for parameter in group['params']
    )


def test_hook_door_scales_the_learning_rate_once(small):
    auto = {'auto_scale_lr': dict(enable=True, base_batch_size=8)}
    by_model, by_hook = train(small(CSG, **auto)), train(hook_door(small(DENSE, **auto)))
    assert by_model.optim_wrapper.get_lr() == by_hook.optim_wrapper.get_lr()


def test_hook_door_resumes_and_tests(small, tmp_path):
    # The exact-resume hook is off here: dropout must not matter.
    quiet = {'model.decode_head.dropout_ratio': 0, 'model.auxiliary_head.dropout_ratio': 0}
    whole = train(hook_door(small(DENSE, iters=4, **quiet))).model.state_dict()
    first = small(DENSE, iters=4, **quiet, **{'default_hooks.checkpoint.interval': 2})
    first.work_dir = str(tmp_path / 'resumed')
    train(hook_door(first))
    (tmp_path / 'resumed' / 'last_checkpoint').write_text(str(tmp_path / 'resumed' / 'iter_2.pth'))
    again = copy.deepcopy(first)
    again.resume, again.experiment_name = True, 'resumed'
    resumed = train(again)
    assert resumed.iter == 4
    assert all(torch.equal(whole[name], tensor) for name, tensor in resumed.model.state_dict().items())
    testing = copy.deepcopy(first)
    testing.update(load_from=str(tmp_path / 'resumed' / 'iter_4.pth'), experiment_name='testing')
    tester = Runner.from_cfg(testing)
    assert 'mIoU' in tester.test()
    assert all(torch.equal(whole[name], tensor) for name, tensor in tester.model.state_dict().items())


def test_a_run_resumes_exactly_from_a_checkpoint_that_save_best_wrote_again(small, tmp_path):
    # In the middle of a validation, after its data loader drew random numbers.
    checkpoint = {'interval': 2, 'max_keep_ckpts': -1, 'save_best': 'mIoU', 'rule': 'greater'}
    options = {f'default_hooks.checkpoint.{key}': value for key, value in checkpoint.items()}
    options |= {'train_cfg.val_interval': 2, 'custom_hooks': [dict(type='ExactResumeHook')]}
    whole = train(small(CSG, iters=4, **options)).model.state_dict()
    cfg = small(CSG, iters=4, **options)
    cfg.update(resume=True, load_from=str(tmp_path / 'iter_2.pth'), work_dir=str(tmp_path / 'resumed'))
    resumed = train(cfg).model.state_dict()
    assert all(torch.equal(whole[name], tensor) for name, tensor in resumed.items())


def test_a_compact_file_is_no_run_to_resume(small, tmp_path):
    train(small(CSG, iters=1, **{'default_hooks.checkpoint.interval': 1}))
    cfg = small(CSG, iters=2)
    cfg.update(resume=True, load_from=str(tmp_path / 'iter_1.safetensors'))
    with pytest.raises(CSGError, match=r'iter_1.safetensors holds weights and no training state to resume; begin a'):
        train(cfg)


def test_hook_without_settings_reports_or_refuses(small):
    cfg = small(CSG, **{'default_hooks.csg': dict(type='CSGHook')})
    before = find_bank(train(cfg).model)
    assert before is not None
    with pytest.raises(CSGError, match='csg=dict'):
        train(small(DENSE, **{'default_hooks.csg': dict(type='CSGHook')}))


def test_a_hook_that_comes_too_late_is_refused(small):
    early = dict(type='EMAHook', priority='HIGHEST')
    with pytest.raises(CSGError, match='EMAHook has copied the dense model before CSGHook; leave out its priority'):
        train(hook_door(small(DENSE, custom_hooks=[early])))


@pytest.mark.parametrize('mode', ['train', 'test'])
def test_a_flexible_runner_needs_a_csg_model(small, mode):
    runner = FlexibleRunner.from_cfg(hook_door(small(DENSE)))
    with pytest.raises(CSGError, match='a FlexibleRunner loads weights before hooks run; build a CSGModel'):
        getattr(runner, mode)()


def test_a_flexible_runner_does_not_test_layers_that_were_reset(small, tmp_path):
    train(small(CSG, iters=1, **{'default_hooks.checkpoint.interval': 1}))
    fewer = {'model.decode_head.num_classes': 5, 'model.reset': ['decode_head.conv_seg']}
    runner = FlexibleRunner.from_cfg(small(CSG, load_from=str(tmp_path / 'iter_1.pth'), **fewer))
    with pytest.raises(CSGError, match='the checkpoint does not fit decode_head.conv_seg; test one of this network'):
        runner.test()


def test_ema_averages_codes_and_generator_and_the_compact_file_holds_the_average(small, tmp_path):
    ema = dict(type='EMAHook', momentum=0.5)
    cfg = small(CSG, iters=3, custom_hooks=[ema], **{'default_hooks.checkpoint.interval': 3})
    runner = train(cfg)
    hook = next(hook for hook in runner.hooks if type(hook).__name__ == 'EMAHook')
    averaged = {name: p.detach().clone() for name, p in hook.ema_model.module.named_parameters()}
    last = dict(runner.model.named_parameters())
    assert averaged.keys() == last.keys()
    for name in ('csg.0.weight', 'backbone.layer4.1.conv2.code'):
        assert not torch.equal(averaged[name], last[name])
    for file in ('iter_3.pth', 'iter_3.safetensors'):
        stored = read_checkpoint(tmp_path / file)['state_dict']
        assert all(torch.equal(stored[name], tensor) for name, tensor in averaged.items())


def test_a_resumed_run_deletes_the_compact_files_of_deleted_checkpoints(small, tmp_path):
    options = {'default_hooks.checkpoint.interval': 1, 'default_hooks.checkpoint.max_keep_ckpts': 2}
    train(small(CSG, iters=2, **options))
    cfg = small(CSG, iters=4, **options)
    cfg.resume = True
    train(cfg)
    assert {path.stem for path in tmp_path.glob('*.safetensors')} == {'iter_3', 'iter_4'}


def test_a_replaced_checkpoint_gets_a_new_compact_file(small, tmp_path):
    options = {'default_hooks.checkpoint.interval': 1, 'default_hooks.checkpoint.filename_tmpl': 'latest.pth'}
    train(small(CSG, iters=3, **options))
    ours = read_checkpoint(tmp_path / 'latest.pth')['state_dict']
    compact = read_checkpoint(tmp_path / 'latest.safetensors')['state_dict']
    assert all(torch.equal(ours[name], compact[name]) for name in ours)


def test_a_hook_with_other_settings_than_the_model_is_refused(small):
    other = dict(type='CSGHook', csg={**SETTINGS, 'code_dim': 64})
    with pytest.raises(CSGError, match='drop one of the two'):
        train(small(CSG, **{'default_hooks.csg': other}))


def test_best_checkpoint_has_a_compact_file(small, tmp_path):
    options = {'train_cfg.val_interval': 2, 'default_hooks.checkpoint.save_best': 'mIoU'}
    train(small(CSG, iters=2, **options))
    assert list(tmp_path.glob('best_mIoU*.pth'))
    for path in tmp_path.glob('*.pth'):
        ours = read_checkpoint(path)['state_dict']
        compact = read_checkpoint(path.with_suffix('.safetensors'))['state_dict']
        assert all(torch.equal(ours[name], compact[name]) for name in ours)


@pytest.mark.parametrize('suffix', ['.pth', '.safetensors'])
def test_init_model_and_inferencer_see_what_was_trained(small, tmp_path, suffix):
    cfg = small(CSG)
    trained = train(cfg).model.eval()
    path = str(tmp_path / f'iter_3{suffix}')
    image = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    model = init_model(copy.deepcopy(cfg), path, device='cpu')
    assert model.dataset_meta['classes'][1] == 'aeroplane'
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in trained.state_dict().items())
    expected = inference_model(model, image).pred_sem_seg.data[0].numpy()
    inferencer = MMSegInferencer(copy.deepcopy(cfg), weights=path, device='cpu')
    assert np.array_equal(inferencer(image, show=False)['predictions'], expected)


def test_sync_bn_conversion_keeps_generated_convs(small):
    init_default_scope('mmseg')
    model = MODELS.build(small(CSG).model)
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    assert converted is model and find_bank(model) is not None
    assert isinstance(model.backbone.layer1[0].conv1, CSGConv)


def test_a_checkpoint_made_with_other_settings_is_refused(small, tmp_path):
    train(small(CSG))
    for options, mistake in (
        ({'model.csg.code_dim': 64}, 'code_dim=128'),
        ({'model.csg.slice_shape': (8, 8, 3, 3)}, 'slice_shape'),
        ({'model.csg.layout': 'flat'}, "layout='block'"),
    ):
        cfg = small(CSG, load_from=str(tmp_path / 'iter_3.pth'), **options)
        with pytest.raises(CSGError, match=mistake):
            Runner.from_cfg(cfg).test()


def test_tta_tests_a_generated_model(small, tmp_path):
    train(small(CSG))
    cfg = small(CSG, load_from=str(tmp_path / 'iter_3.pth'))
    cfg.tta_pipeline[1].transforms[0] = [dict(type='Resize', scale_factor=1.0, keep_ratio=True)]
    cfg.test_dataloader.dataset.pipeline = cfg.tta_pipeline
    cfg.tta_model.module = cfg.model
    cfg.model = cfg.tta_model
    assert 'mIoU' in Runner.from_cfg(cfg).test()
