"""AccumulationHook: one generation for all batches of an optimizer step."""

import pytest
import torch
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from small_runs import CSG, DENSE, hook_door, small_config, train

from csg_seg import CSGError
from csg_seg.layers.accumulation import Accumulation

STEPS = {'optim_wrapper.accumulative_counts': 2}
HOOK = {'default_hooks.accumulation': dict(type='AccumulationHook')}


@pytest.mark.parametrize('door', ['model', 'hook'])
def test_training_is_the_same_with_half_as_many_generations(door, drawn, tmp_path, monkeypatch):
    made = []
    make = Accumulation._make
    monkeypatch.setattr(Accumulation, '_make', lambda self, *args: made.append(1) or make(self, *args))
    trained = {}
    for name, hook in (('plain', {}), ('once', HOOK)):
        cfg = small_config(CSG if door == 'model' else DENSE, drawn, tmp_path / name, iters=5, **STEPS)
        cfg.optim_wrapper.clip_grad = dict(max_norm=0.5)
        cfg.model.decode_head.dropout_ratio = cfg.model.auxiliary_head.dropout_ratio = 0
        if door == 'hook':
            hook_door(cfg)
        cfg.merge_from_dict(hook)
        runner = train(cfg)
        trained[name] = runner.model.state_dict()
        assert hasattr(runner.optim_wrapper.step, '_with_counter')  # otherwise schedulers warn
    assert len(made) == 3  # 2, 2 and 1 batches
    for name, wanted in trained['plain'].items():
        torch.testing.assert_close(
            trained['once'][name], wanted, rtol=1e-3, atol=1e-5, msg=lambda text, n=name: n + text
        )


def test_one_batch_in_a_step_is_trained_as_usual(drawn, tmp_path, monkeypatch):
    monkeypatch.setattr(Accumulation, '_make', None)  # would fail
    assert train(small_config(CSG, drawn, tmp_path, iters=2, **HOOK)).iter == 2


def test_a_dense_network_is_refused(drawn, tmp_path):
    cfg = small_config(DENSE, drawn, tmp_path, **HOOK)
    with pytest.raises(CSGError, match='no generators; remove the hook, or give a CSG config'):
        train(cfg)


def test_a_training_that_stops_inside_a_step_leaves_nothing_on(drawn, tmp_path):
    cfg = small_config(CSG, drawn, tmp_path, iters=5, **STEPS, **HOOK)
    cfg.custom_hooks = [dict(type='StopAfterOne')]
    runner = train(cfg)
    assert runner.iter == 1 and not runner.model.csg.accumulation.is_on


@HOOKS.register_module()
class StopAfterOne(Hook):
    """Stop the training after its first batch, as early stopping does."""

    def after_train_iter(self, runner, *args, **kwargs):
        runner.train_loop.stop_training = True
