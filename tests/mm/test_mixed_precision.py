"""Mixed precision on a CPU."""

import json

import pytest
import torch
from conftest import cfg_options, run_tool
from mmengine.optim import build_optim_wrapper
from mmengine.registry import OPTIM_WRAPPERS
from small_runs import CSG, small_config
from torch import nn

from csg_seg.mm.mixed_precision import has_bfloat16

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason='there is a GPU')
AMP = dict(type='AmpOptimWrapper', optimizer=dict(type='SGD', lr=0.1, momentum=0.9))


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 4))


def images():
    return torch.randn(5, 3, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def emulated(monkeypatch):
    """Torch emulates bfloat16 where the CPU has none."""
    monkeypatch.setattr('csg_seg.mm.mixed_precision.has_bfloat16', lambda: True)


def test_a_step_is_one_of_autocast_without_loss_scaling():
    model, plain = network(), network()
    wrapper = build_optim_wrapper(model, dict(AMP))
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.1, momentum=0.9)
    for _ in range(2):
        with wrapper.optim_context(model):
            scores = model(images())
        assert scores.dtype == torch.bfloat16
        wrapper.update_params(scores.float().square().mean())
        with torch.autocast('cpu', dtype=torch.bfloat16):
            loss = plain(images()).float().square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    for got, wanted in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(got, wanted)


def test_the_optimizer_s_state_is_restored():
    model = network()
    wrapper = build_optim_wrapper(model, dict(AMP))
    with wrapper.optim_context(model):
        loss = model(images()).float().square().mean()
    wrapper.update_params(loss)
    state = wrapper.state_dict()
    assert state['loss_scaler'] == {}
    other = build_optim_wrapper(network(), dict(AMP))
    other.load_state_dict(state)
    for one, two in zip(wrapper.optimizer.state.values(), other.optimizer.state.values(), strict=True):
        assert torch.equal(one['momentum_buffer'], two['momentum_buffer'])


def test_it_stands_for_mmengines_wrapper():
    from mmengine.optim import AmpOptimWrapper

    assert issubclass(OPTIM_WRAPPERS.get('AmpOptimWrapper'), AmpOptimWrapper)


def test_the_tools_train_resume_and_test_in_bfloat16(drawn, tmp_path):
    if not has_bfloat16():
        pytest.skip('this CPU has no bfloat16 instructions')
    small_config(CSG, drawn, tmp_path / 'config').dump(tmp_path / 'small.py')
    command = [tmp_path / 'small.py', '--amp', '--work-dir', tmp_path / 'run']
    run_tool('train.py', *command, *cfg_options({'default_hooks.checkpoint.interval': 3, 'log_level': 'INFO'}))
    checkpoint = tmp_path / 'run' / 'iter_3.pth'
    assert torch.load(checkpoint, weights_only=False)['optimizer']['loss_scaler'] == {}
    more = {'train_cfg.max_iters': 4, 'default_hooks.checkpoint.interval': 4}
    run_tool('train.py', *command, '--resume', *cfg_options(more))
    assert (tmp_path / 'run' / 'iter_4.pth').exists()
    exact, half = (
        json.loads(run_tool('test.py', tmp_path / 'small.py', checkpoint, '--json', *amp).stdout)
        for amp in ([], ['--amp'])
    )
    assert half.keys() == exact.keys()
    assert half['aAcc'] == pytest.approx(exact['aAcc'], abs=5)
