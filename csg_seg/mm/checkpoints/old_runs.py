"""Resume trainings of csg_seg 0.1.0, whose optimizer state has another order."""

from torch import nn

from csg_seg.errors import CSGError
from csg_seg.generators.signature import read_layers
from csg_seg.layers.bank import BANK

REORDERED = 'csg_generators_first'


def put_generators_first(checkpoint: dict, model: nn.Module) -> None:
    """Move the generators' entries in the optimizer state of csg_seg 0.1.0 from the end to the start.

    Checkpoints of later versions, and those reordered already, are left as they are.

    Args:
        checkpoint: of a training that is resumed, changed in place.
        model: retrofitted.

    Raises:
        CSGError: the parameter groups do not show which parameter is which.
    """
    settings = checkpoint.get('state_dict', {}).get(f'{BANK}.0._extra_state')
    groups = checkpoint.get('optimizer', {}).get('param_groups')
    if settings is None or not groups or read_layers(settings) is not None or REORDERED in checkpoint:
        return
    checkpoint[REORDERED] = True
    is_single = len(groups) == 1
    # With several groups, mmengine makes one for each parameter that is not frozen.
    names = [name for name, each in model.named_parameters() if is_single or each.requires_grad]
    old_order = sorted(names, key=lambda name: name.startswith(f'{BANK}.'))
    items = groups[0]['params'] if is_single else groups
    if len(items) != len(names) or not (is_single or all(len(group['params']) == 1 for group in groups)):
        raise CSGError(
            'this run of csg_seg 0.1.0 has an optimizer with groups of several parameters, which cannot be reordered; '
            'begin a new run with its weights (load_from, without --resume)'
        )
    place = {name: position for position, name in enumerate(old_order)}
    items[:] = [items[place[name]] for name in names]
