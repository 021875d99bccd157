"""AccumulationHook: generate weights once for all batches of an optimizer step."""

from contextlib import ExitStack
from functools import wraps
from typing import Any

from mmengine.dist import get_world_size
from mmengine.hooks import Hook
from mmengine.optim import OptimWrapperDict
from mmengine.registry import HOOKS
from mmengine.runner import Runner

from csg_seg.errors import CSGError
from csg_seg.layers.bank import find_bank
from csg_seg.mm.model import bare_model


@HOOKS.register_module()
class AccumulationHook(Hook):
    """Generate weights once for all batches of an optimizer step, for ``accumulative_counts`` of more than one.

    The trained weights are the same up to rounding. See :meth:`csg_seg.layers.bank.GeneratorBank.accumulate`.
    """

    def before_train(self, runner: Runner) -> None:
        """Send the sums of the weights' gradients through the generators before each step.

        Raises:
            CSGError: the network has no generators, there are several optimizers, or several processes train.
        """
        bank, wrapper = find_bank(bare_model(runner.model)), runner.optim_wrapper
        if bank is None:
            raise CSGError('AccumulationHook: the network has no generators; remove the hook, or give a CSG config')
        if isinstance(wrapper, OptimWrapperDict):
            raise CSGError('AccumulationHook: works with one optimizer; remove the hook')
        if get_world_size() > 1:
            raise CSGError('AccumulationHook: works in one process; remove the hook')
        if wrapper._accumulative_counts == 1:
            runner.logger.warning('AccumulationHook has no effect without accumulative_counts in optim_wrapper.')
        self.bank, self.block = bank, ExitStack()
        self.is_on = wrapper._accumulative_counts > 1
        step = wrapper.step

        @wraps(step)  # keeps the mark by which schedulers know that steps are counted
        def send_and_step(**kwargs: Any) -> None:
            self.block.close()
            step(**kwargs)

        wrapper.step = send_and_step

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None) -> None:
        """Begin to accumulate, in the first batch of a step."""
        if self.is_on and not self.bank.accumulation.is_on:
            self.block.enter_context(self.bank.accumulate())

    def after_train(self, runner: Runner) -> None:
        """End what a training began that stopped between two steps."""
        self.block.close()
