"""The two places where mmengine itself is changed."""

import re
from collections.abc import Callable, Mapping
from functools import wraps
from typing import Any

import mmengine.runner.checkpoint
from mmengine.optim import DefaultOptimWrapperConstructor
from mmengine.registry import OPTIM_WRAPPER_CONSTRUCTORS
from torch import nn

from csg_seg.errors import CSGError
from csg_seg.layers.bank import BANK, find_bank, find_roots
from csg_seg.layers.conv import generated_convs

GENERATOR = re.compile(rf'(^|\.){BANK}\.\d+\._extra_state$')


def check_kind(model: nn.Module, state_dict: Mapping[str, Any]) -> None:
    """Refuse codes for layers that are dense in a model, which mmengine would leave random.

    Args:
        model: a network or a part of one.
        state_dict: about to be loaded into it.

    Raises:
        CSGError: the state dict holds generators and the model has no generated layer, or it holds codes of a layer
            of which the model wants the weight.
    """
    own = model.state_dict().keys()
    foreign = [name for name in state_dict if name not in own]
    generators = [name for name in foreign if GENERATOR.search(name)]
    if generators and not any(generated_convs(model)):
        raise CSGError(
            f'the checkpoint holds codes and a generator ({generators[0]}) but the config is dense, or has its csg in '
            'CSGHook, which a Runner alone runs; use a config with CSGModel, or materialise the checkpoint first '
            '(tools/materialise.py)'
        )
    if any(find_roots(model)):  # a root looks at codes itself
        return
    for name in foreign:
        weight = f'{name.removesuffix("code")}weight'
        if name.endswith('.code') and weight in own and weight not in state_dict:
            raise CSGError(
                f'the checkpoint holds {name}, and this layer is dense in the model, or loaded without its generator; '
                "set the config's csg to the checkpoint's and load it as a whole, or materialise it first"
            )


def _refuse_codes(load: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(load)
    def load_state_dict(module: nn.Module, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        check_kind(module, state_dict)
        return load(module, state_dict, *args, **kwargs)

    return load_state_dict


# Whatever loads checkpoints for mmengine ends there: Runner, init_model, inferencers.
mmengine.runner.checkpoint.load_state_dict = _refuse_codes(mmengine.runner.checkpoint.load_state_dict)


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
