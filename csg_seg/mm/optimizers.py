"""Optimizers' settings of single parameters, for those of generators."""

from typing import Any

from mmengine.optim import DefaultOptimWrapperConstructor
from mmengine.registry import OPTIM_WRAPPER_CONSTRUCTORS
from torch import nn

from ..bank import BANK, find_bank


@OPTIM_WRAPPER_CONSTRUCTORS.register_module(name='DefaultOptimWrapperConstructor', force=True)
class OptimWrapperConstructor(DefaultOptimWrapperConstructor):
    """mmengine's own, for which the hidden bias of an mlp generator is a bias.

    mmengine knows biases by the name ``bias``. Nothing else differs, and networks that are not retrofitted are treated
    by mmengine alone.
    """

    def add_params(self, params: list[dict], module: nn.Module, prefix: str = '', **kwargs: Any) -> None:
        """Add a group for each parameter, as mmengine does, with the settings of ``paramwise_cfg``."""
        super().add_params(params, module, prefix, **kwargs)
        bank = find_bank(module)
        if bank is None:
            return
        biases = {id(each): name for name, each in bank.named_parameters() if name.endswith('hidden_bias')}
        for group in params:
            name = biases.get(id(group['params'][0]))
            # What is meant for a parameter by name goes before what is meant for all biases.
            if name and not any(key in f'{prefix}.{BANK}.{name}' for key in self.paramwise_cfg.get('custom_keys', {})):
                self._treat_as_bias(group)

    def _treat_as_bias(self, group: dict) -> None:
        lr_mult, decay_mult = (self.paramwise_cfg.get(f'bias_{key}_mult') for key in ('lr', 'decay'))
        if lr_mult is not None:
            group['lr'] = self.base_lr * lr_mult
        if decay_mult is not None and self.base_wd is not None:
            group['weight_decay'] = self.base_wd * decay_mult
