"""Runs of earlier versions."""

from torch import nn

from csg_seg.errors import CSGError
from csg_seg.generators.signature import read_layers
from csg_seg.layers.bank import BANK

REORDERED = 'csg_generators_first'


def put_generators_first(checkpoint: dict, model: nn.Module) -> None:
    """Reorder, once, the optimizer's state of a run of csg_seg 0.1.0, in which the generators' parameters came last.

    Args:
        checkpoint: of a training that is resumed, changed in place.
        model: retrofitted.

    Raises:
        CSGError: its parameter groups do not say which parameter is which.
    """
    settings = checkpoint.get('state_dict', {}).get(f'{BANK}.0._extra_state')
    groups = checkpoint.get('optimizer', {}).get('param_groups')
    if settings is None or not groups or read_layers(settings) is not None or REORDERED in checkpoint:
        return
    checkpoint[REORDERED] = True
    single = len(groups) == 1
    # mmengine makes no group for a frozen parameter.
    names = [name for name, each in model.named_parameters() if single or each.requires_grad]
    earlier = sorted(names, key=lambda name: name.startswith(f'{BANK}.'))
    items = groups[0]['params'] if single else groups
    if len(items) != len(names) or not (single or all(len(group['params']) == 1 for group in groups)):
        raise CSGError(
            'a run of csg_seg 0.1.0, whose optimizer state has another order, with groups of several parameters; '
            'begin a new run with its weights (load_from, without --resume)'
        )
    place = {name: position for position, name in enumerate(earlier)}
    items[:] = [items[place[name]] for name in names]
