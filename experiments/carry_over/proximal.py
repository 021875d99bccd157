"""ProximalHook: pull a dense network's weights towards weights that can be generated."""

from copy import deepcopy
from typing import Any

import torch
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from mmengine.runner import Runner
from torch import Tensor

from csg_seg.errors import CSGError
from csg_seg.layers.bank import bank_of
from csg_seg.layers.conv import check_finite
from csg_seg.mm.model import bare_model, share_fit
from csg_seg.retrofitting.surgery import CSG, retrofit


@HOOKS.register_module()
class ProximalHook(Hook):
    """Pull a dense network's weights towards the nearest generated weights during training.

    Each optimizer step is followed by a proximal step, decoupled from the learning rate.
    Fitting a generator to the result leaves a smaller error.

    Args:
        csg: one dict of generator settings, or a list of them.
        strength: fraction of the distance to the generated weight that a step covers at
            the end of training; it grows linearly from zero.
        interval: steps between two fits of generators and codes; each epoch starts with a fit too.

    Raises:
        CSGError: an argument is out of range.
    """

    priority = 'LOW'

    def __init__(self, csg: CSG, strength: float = 0.05, interval: int = 40):
        if not 0 < strength <= 1 or interval < 1:
            raise CSGError(f'ProximalHook: strength is from 0 to 1, interval at least 1; got {strength}, {interval}')
        self.csg, self.strength, self.interval = csg, strength, interval
        self._nearest: dict[str, Tensor] = {}

    def before_train(self, runner: Runner) -> None:
        """Make the generated counterpart that supplies the nearest weights."""
        self._twin = retrofit(deepcopy(bare_model(runner.model)), self.csg)
        bank_of(self._twin).loading.after_fit = share_fit

    def before_train_epoch(self, runner: Runner) -> None:
        """Fit again at the next step, so that a run resumed from an epoch's end equals an uninterrupted one."""
        self._nearest = {}

    def after_train(self, runner: Runner) -> None:
        """Free the counterpart."""
        del self._twin
        self._nearest = {}

    def after_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        """Move the weights towards the nearest generated weights."""
        model: Any = bare_model(runner.model)
        bank = bank_of(self._twin)
        if runner.iter % self.interval == 0 or not self._nearest:
            for name, conv in bank.layers.items():
                weight = model.get_submodule(name).weight.detach()
                check_finite(f'{name}.weight', weight)
                conv.loaded = weight
            bank.fit_loaded()
            self._nearest = {name: conv.generate_weight().detach() for name, conv in bank.layers.items()}
        share = self.strength * min(1.0, (runner.iter + 1) / runner.max_iters)
        with torch.no_grad():
            for name, nearest in self._nearest.items():
                model.get_submodule(name).weight.lerp_(nearest, share)
