"""Build a dense network from what a file says of it.

A file may come from anywhere: a builder takes names of known networks and plain
values, reaches no other file and no network, and runs no code that a file names.
"""

import json
import math
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from csg_seg.errors import CSGError

Builder = Callable[..., nn.Module]
Source = Mapping[str, Any]
BUILDERS: dict[str, Builder] = {}
FACTORIES = {torch.empty, torch.zeros, torch.ones, torch.full, torch.rand, torch.randn, torch.eye}


def register_builder(name: str) -> Callable[[Builder], Builder]:
    """Make a function known by a name, under which a compact file asks for it.

    ::

        @csg_seg.register_builder('mine')
        def build_mine(*, width: int = 64) -> nn.Module: ...

        csg_seg.save_compact(model, 'model.safetensors', source=dict(builder='mine', width=96))

    Args:
        name: of the builder; an earlier one of that name is replaced.
    """

    def register(builder: Builder) -> Builder:
        BUILDERS[name] = builder
        return builder

    return register


def check_source(source: Source) -> None:
    """Refuse a source that no file can hold, or whose builder is not known.

    Raises:
        CSGError: says which.
    """
    if not isinstance(source, Mapping) or not isinstance(source.get('builder'), str):
        raise CSGError(f"source must be a dict with 'builder', one of {_known()}; got {str(source)[:80]}")
    if source['builder'] not in BUILDERS:
        raise CSGError(
            f'there is no builder {source["builder"][:40]!r}, only {_known()}; '
            'install csg_seg[mm], or register yours with csg_seg.register_builder'
        )
    encode_source(source)


def encode_source(source: Source) -> str:
    """Write a source as JSON, tuples as ``{"tuple": [...]}``, for networks and pipelines that tell them from lists.

    Raises:
        CSGError: it holds other than plain values.
    """
    try:
        return json.dumps(_tag_tuples(source))
    except (TypeError, ValueError) as error:
        raise CSGError(f'source must be plain values, which JSON can hold ({error})') from None


def decode_source(text: str) -> Any:
    """Read what :func:`encode_source` wrote."""
    return json.loads(text, object_hook=lambda each: tuple(each['tuple']) if [*each] == ['tuple'] else each)


def _tag_tuples(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _tag_tuples(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        items = [_tag_tuples(each) for each in value]
        return {'tuple': items} if isinstance(value, tuple) else items
    return value


def build(source: Source, *, most_values: int | None = None) -> nn.Module:
    """Build the dense network of a source, without trained weights.

    Args:
        source: ``builder`` and its arguments.
        most_values: that its tensors may take together, before it is refused.

    Raises:
        CSGError: there is no such builder, it cannot build this, or this is too large.
    """
    check_source(source)
    arguments = {key: value for key, value in source.items() if key != 'builder'}
    try:
        with nullcontext() if most_values is None else _Limit(most_values):
            return BUILDERS[source['builder']](**arguments)
    except CSGError:
        raise
    # Whatever a foreign library makes of foreign values.
    except Exception as error:
        what = f'{type(error).__name__}: {" ".join(str(error).split())[:200]}'
        raise CSGError(f'the builder {source["builder"]!r} cannot build the network ({what}); give the model') from None


class _Limit(TorchFunctionMode):
    """Refuse to allocate more than so many values, before they take memory."""

    def __init__(self, most_values: int):
        super().__init__()
        self.left = most_values

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        """Count what a factory is asked for, and look at what anything else returns."""
        kwargs = kwargs or {}
        if func in FACTORIES:
            shape = kwargs.get('size', args[0] if args and isinstance(args[0], (tuple, list)) else args)
            values = math.prod(size for size in shape if isinstance(size, int) and size > 0)
            self.left -= values**2 if func is torch.eye and len(shape) == 1 else values
            self._check(0)
        result = func(*args, **kwargs)
        if isinstance(result, Tensor):
            self._check(result.numel())
        return result

    def _check(self, values: int) -> None:
        if values > self.left:
            raise CSGError('the network that the file names is far larger than the weights in it; the file lies')


@register_builder('torchvision')
def build_torchvision(*, name: str, **arguments: Any) -> nn.Module:
    """Build a network of torchvision by the name of its function, such as 'resnet18' or 'deeplabv3_resnet50'."""
    models = import_module('torchvision.models')
    weights = ('weights', 'weights_backbone')
    _check_plain(name, arguments, refused=weights)
    taken = models.get_model_builder(name).__annotations__
    return models.get_model(name, **{key: None for key in weights if key in taken}, **arguments)


@register_builder('timm')
def build_timm(*, name: str, **arguments: Any) -> nn.Module:
    """Build a network of timm by name, such as 'resnet18'; timm must be installed."""
    timm = import_module('timm')
    if not timm.is_model(name):  # nor of a hub, which timm would ask
        raise CSGError(f'timm has no network {name[:80]!r}')
    files = ('pretrained', 'pretrained_cfg', 'pretrained_cfg_overlay', 'checkpoint_path', 'cache_dir')
    _check_plain(name, arguments, refused=files)
    return timm.create_model(name, pretrained=False, **arguments)


def _check_plain(name: str, arguments: Mapping[str, Any], *, refused: tuple[str, ...]) -> None:
    if not isinstance(name, str):
        raise CSGError(f'the name of a network is text; got {str(name)[:40]}')
    for key in arguments:
        if key in refused:
            raise CSGError(f'{key} is not for files, whose weights are their own; leave it out')


def _known() -> str:
    return ', '.join(map(repr, BUILDERS))
