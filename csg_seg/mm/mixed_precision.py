"""Mixed precision on a CPU: mmengine's ``AmpOptimWrapper`` accepts GPUs only."""

import platform
from typing import Any

import mmengine.optim
import torch
from mmengine.device import get_device
from mmengine.optim import OptimWrapper
from mmengine.registry import OPTIM_WRAPPERS

from csg_seg.errors import CSGError


def has_bfloat16() -> bool:
    """Say whether this CPU has bfloat16 instructions; without them, torch emulates bfloat16 slowly."""
    if platform.machine() in ('x86_64', 'AMD64'):
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.ops.mkldnn._is_mkldnn_bf16_supported()


def check_mixed_precision(dtype: str | torch.dtype | None = None) -> None:
    """Check that this machine can train and test in mixed precision.

    Args:
        dtype: of ``AmpOptimWrapper``.

    Raises:
        CSGError: there is no GPU, and the CPU has no bfloat16 instructions or ``dtype`` is another one.
    """
    if get_device() != 'cpu':
        return
    if dtype not in (None, 'bfloat16', torch.bfloat16):
        raise CSGError(f'mixed precision in {dtype} needs a GPU; set optim_wrapper.dtype=bfloat16, or remove it')
    if not has_bfloat16():
        raise CSGError(
            'mixed precision needs a GPU or a CPU with bfloat16 instructions (AVX512-BF16, AMX), and this machine has '
            'neither; leave --amp out, or set optim_wrapper.type=OptimWrapper'
        )


@OPTIM_WRAPPERS.register_module(name='AmpOptimWrapper', force=True)
class AmpOptimWrapper(mmengine.optim.AmpOptimWrapper):
    """mmengine's wrapper, which also works on a CPU: autocast to bfloat16, whose range needs no loss scaling.

    Args:
        loss_scale: has no effect on a CPU.
        dtype: None or 'bfloat16' on a CPU.
        use_fsdp: has no effect on a CPU.
        **kwargs: of ``OptimWrapper``.

    Raises:
        CSGError: there is no GPU, and the CPU has no bfloat16 instructions or ``dtype`` is another one.
    """

    def __init__(
        self,
        loss_scale: Any = 'dynamic',
        dtype: str | torch.dtype | None = None,
        use_fsdp: bool = False,
        **kwargs: Any,
    ):
        if get_device() != 'cpu':
            super().__init__(loss_scale=loss_scale, dtype=dtype, use_fsdp=use_fsdp, **kwargs)
            return
        check_mixed_precision(dtype)
        OptimWrapper.__init__(self, **kwargs)
        self.cast_dtype = torch.bfloat16
        self.loss_scaler = torch.amp.GradScaler('cpu', enabled=False)
        self._scale_update_param = None
