"""``--amp``: mixed precision in training and testing."""

import torch
from mmengine.config import Config
from mmengine.device import get_device

from csg_seg.errors import CSGError
from csg_seg.mm.config_parts import config_hooks
from csg_seg.mm.mixed_precision import check_mixed_precision


def use_amp_to_train(cfg: Config) -> None:
    """Switch a config's training to mixed precision, as mmsegmentation's tool does; see also :func:`prepare_cpu`.

    Raises:
        CSGError: the config has another optimizer wrapper, or there is no GPU and the CPU has no bfloat16 instructions.
    """
    kind = cfg.optim_wrapper.get('type', 'OptimWrapper')
    if kind not in ('OptimWrapper', 'AmpOptimWrapper'):
        raise CSGError(f'--amp works with optim_wrapper.type OptimWrapper, the config has {kind}; leave --amp out')
    cfg.optim_wrapper.type = 'AmpOptimWrapper'
    cfg.optim_wrapper.setdefault('loss_scale', 'dynamic')
    prepare_cpu(cfg)


def use_amp_to_test(cfg: Config) -> None:
    """Switch a config's testing to mixed precision; see also :func:`prepare_cpu`.

    Raises:
        CSGError: there is no GPU and the CPU has no bfloat16 instructions.
    """
    cfg.test_cfg.fp16 = True
    prepare_cpu(cfg)


def prepare_cpu(cfg: Config) -> None:
    """Without a GPU, add what makes bfloat16 fast: channels-last memory format, and denormal numbers as zero.

    Raises:
        CSGError: there is no GPU and the CPU has no bfloat16 instructions.
    """
    if get_device() != 'cpu':
        return
    check_mixed_precision()
    torch.set_flush_denormal(True)
    if not any(hook.get('type') == 'ChannelsLastHook' for hook in config_hooks(cfg)):
        cfg.custom_hooks = [*(cfg.get('custom_hooks') or []), dict(type='ChannelsLastHook')]
