"""The four places where mmengine itself is changed.

1. ``mmengine.runner.checkpoint.load_state_dict``, which loads every checkpoint in mmengine, refuses codes for layers
   that are dense in the model: mmengine would only log them as unexpected and leave the layers random.
2. ``DefaultOptimWrapperConstructor`` treats each generator parameter whose name ends in ``bias`` as a bias: mmengine
   recognises biases only by the name ``bias``.
3. Looking up a base such as ``mmseg::...`` parses each metafile of the package once. mmengine parses all of them
   again for each base, a quarter of a second each time.
4. ``AmpOptimWrapper`` works on CPUs too; see :mod:`csg_seg.mm.mixed_precision`.
"""

from collections.abc import Callable, Mapping
from functools import cache, wraps
from typing import Any

import mmengine.config.utils
import mmengine.runner.checkpoint
from mmengine.optim import DefaultOptimWrapperConstructor
from mmengine.registry import OPTIM_WRAPPER_CONSTRUCTORS
from torch import nn

from csg_seg.errors import CSGError
from csg_seg.layers.bank import BANK, find_bank, find_roots
from csg_seg.layers.conv import generated_convs

from .checkpoints.reading import generator_names


def check_kind(model: nn.Module, state_dict: Mapping[str, Any]) -> None:
    """Refuse codes for layers that are dense in a model.

    Args:
        model: a network or a part of one.
        state_dict: about to be loaded into it.

    Raises:
        CSGError: the state dict holds generators and the model has no generated layer, or it holds a code where the
            model needs a weight.
    """
    own = model.state_dict().keys()
    foreign = [name for name in state_dict if name not in own]
    generators = generator_names(foreign)
    if generators and not any(generated_convs(model)):
        raise CSGError(
            'a CSG checkpoint, and the config is dense, or has its csg in CSGHook, which init_model does not run; use '
            'a config with CSGModel, or materialise the checkpoint (tools/materialise.py)'
        )
    if any(find_roots(model)):  # roots check codes themselves
        return
    for name in foreign:
        weight = f'{name.removesuffix("code")}weight'
        if name.endswith('.code') and weight in own and weight not in state_dict:
            raise CSGError(
                f'the checkpoint holds {name}, and this layer is dense in the model, or loaded without its generator; '
                "set csg to the checkpoint's and load the whole model, or materialise the checkpoint first"
            )


def _refuse_codes(load: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(load)
    def load_state_dict(module: nn.Module, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        check_kind(module, state_dict)
        return load(module, state_dict, *args, **kwargs)

    return load_state_dict


mmengine.runner.checkpoint.load_state_dict = _refuse_codes(mmengine.runner.checkpoint.load_state_dict)
mmengine.config.utils.load = cache(mmengine.config.utils.load)


@OPTIM_WRAPPER_CONSTRUCTORS.register_module(name='DefaultOptimWrapperConstructor', force=True)
class OptimWrapperConstructor(DefaultOptimWrapperConstructor):
    """mmengine's constructor, which also applies ``bias_lr_mult`` and ``bias_decay_mult`` to generators' biases."""

    def add_params(self, params: list[dict], module: nn.Module, prefix: str = '', **kwargs: Any) -> None:
        """Add a group for each parameter, as mmengine does, with the settings of ``paramwise_cfg``."""
        super().add_params(params, module, prefix, **kwargs)
        bank = find_bank(module)
        if bank is None:
            return
        biases = {id(each): name for name, each in bank.named_parameters() if name.endswith('bias')}
        for group in params:
            name = biases.get(id(group['params'][0]))
            # custom_keys take precedence over the settings of all biases.
            if name and not any(key in f'{prefix}.{BANK}.{name}' for key in self.paramwise_cfg.get('custom_keys', {})):
                self._treat_as_bias(group)

    def _treat_as_bias(self, group: dict) -> None:
        lr_mult, decay_mult = (self.paramwise_cfg.get(f'bias_{key}_mult') for key in ('lr', 'decay'))
        if lr_mult is not None:
            group['lr'] = self.base_lr * lr_mult
        if decay_mult is not None and self.base_wd is not None:
            group['weight_decay'] = self.base_wd * decay_mult
