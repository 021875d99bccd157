"""CheckpointGuardHook: refuse checkpoints that do not fit, or that a run cannot resume from."""

from collections.abc import Mapping
from typing import Any

from mmengine.hooks import Hook
from mmengine.optim import OptimWrapper, OptimWrapperDict
from mmengine.runner import Runner, find_latest_checkpoint

from csg_seg.errors import CSGError
from csg_seg.layers.bank import find_bank
from csg_seg.mm.checkpoints.old_runs import put_generators_first
from csg_seg.mm.checkpoints.reading import check_weights, generator_names
from csg_seg.mm.model import bare_model
from csg_seg.mm.patches import check_kind

# Settings that only some kinds of torch's optimizers have.
KIND = {'momentum', 'betas', 'alpha', 'rho', 'lambd', 'etas', 'lr_decay'}

ANEW = 'begin a new run with its weights: --cfg-options load_from={}, without --resume'


class CheckpointGuardHook(Hook):
    """Refuse to resume from a checkpoint without training state, or with the state of another optimizer.

    Weights that do not fit the network are refused too; a retrofitted one checks those of its generated layers.

    Args:
        complete: whether a checkpoint must have all weights, as for a test; a resumed run needs them too.
    """

    def __init__(self, *, complete: bool = False):
        self.complete = complete

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Compare weights with the network, and optimizer state with the config's optimizer."""
        prepare_resume(runner, checkpoint)
        model = bare_model(runner.model)
        state_dict, complete = checkpoint.get('state_dict', checkpoint), self.complete or runner._resume
        if find_bank(model) is None:
            check_kind(model, state_dict)
        if complete or find_bank(model) is None:
            check_weights(model, state_dict, complete=complete)
        if not runner._resume or not isinstance(runner.optim_wrapper, (OptimWrapper, OptimWrapperDict)):
            return
        _check_training_state(runner, checkpoint)
        if 'optimizer' in checkpoint:
            other = _other_optimizer(runner.optim_wrapper, checkpoint['optimizer'])
            if other:
                path = _resumed_from(runner)
                raise CSGError(
                    f'{path} was saved by {other}; resume with the settings it was trained with, or {ANEW.format(path)}'
                )


def prepare_resume(runner: Runner, checkpoint: dict) -> None:
    """In a run that resumes, load all layers whatever ``reset`` says, and reorder optimizer states of csg_seg 0.1.0.

    Raises:
        CSGError: the checkpoint is that of a dense network, as when ``load_from`` of the config names one, or has no
            training state, like a compact checkpoint.
    """
    model = bare_model(runner.model)
    bank = find_bank(model)
    if runner._resume and bank is not None:
        if not generator_names(checkpoint.get('state_dict', checkpoint)):
            raise CSGError(
                f'{_resumed_from(runner)}: the run would resume from a dense checkpoint; begin a new run with it, '
                'without --resume, or set load_from=None to resume from the latest checkpoint'
            )
        _check_training_state(runner, checkpoint)
        bank.reset.is_on = False
        put_generators_first(checkpoint, model)


def _resumed_from(runner: Runner) -> str:
    return runner._load_from or find_latest_checkpoint(runner.work_dir)


def _check_training_state(runner: Runner, checkpoint: Mapping[str, Any]) -> None:
    if not {'epoch', 'iter'} <= {*checkpoint.get('meta', {})} or 'message_hub' not in checkpoint:
        path = _resumed_from(runner)
        raise CSGError(f'{path} holds weights and no training state to resume; {ANEW.format(path)}')


def _other_optimizer(optim_wrapper: OptimWrapper | OptimWrapperDict, stored: Mapping[str, Any]) -> str:
    """Describe the optimizer that saved a state if this one could not resume from it, and return '' otherwise."""
    if isinstance(optim_wrapper, OptimWrapperDict):
        ours = dict(optim_wrapper.items())
        if stored.keys() != ours.keys():
            return f'the optimizers {", ".join(stored)}, and the config has {", ".join(ours)}'
        return next(filter(None, (_other_optimizer(each, stored[name]) for name, each in ours.items())), '')
    if 'param_groups' not in stored:
        return f'the optimizers {", ".join(stored)}, and the config has one'
    # With several groups, the wrapper's own list has one more entry, mmengine's base settings.
    theirs, groups = stored['param_groups'], optim_wrapper.optimizer.param_groups
    if len(theirs) != len(groups):
        return f'an optimizer of {len(theirs)} parameter groups, and the config makes {len(groups)}'
    for position, (their, group) in enumerate(zip(theirs, groups, strict=True)):
        sizes = len(their['params']), len(group['params'])
        if sizes[0] != sizes[1]:
            return f'an optimizer of {sizes[0]} parameters in group {position}, and the config puts {sizes[1]} there'
        kinds = [', '.join(sorted(KIND & each.keys())) or 'none of them' for each in (their, group)]
        if kinds[0] != kinds[1]:
            return f"another kind of optimizer ({kinds[0]}), not the config's ({kinds[1]})"
    return ''
