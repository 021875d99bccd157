"""Build the dense network that a file describes.

A file may come from anywhere: a builder takes names of known networks and plain values, reads no other file, opens no
connection, and runs no code from the file.
"""

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from importlib import import_module
from inspect import signature
from threading import RLock, get_ident
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakIdKeyDictionary

from csg_seg.errors import CSGError

Builder = Callable[..., nn.Module]
Source = Mapping[str, Any]
BUILDERS: dict[str, Builder] = {}
FACTORIES = {torch.empty, torch.zeros, torch.ones, torch.full, torch.rand, torch.randn, torch.eye}
TIMM_FILES = ('pretrained', 'pretrained_cfg', 'pretrained_cfg_overlay', 'checkpoint_path', 'cache_dir')
MONAI_FUNCTIONS = r'resnet\d+|MedNe[Xx]t\w+|vista3d132'
# Keys of transformers' configs whose text says nothing about how a network is built.
NOTES = ('id2label', 'label2id', '_name_or_path')


def register_builder(name: str) -> Callable[[Builder], Builder]:
    """Register a function that builds networks for compact files, under a name.

    ::

        @csg_seg.register_builder('mine')
        def build_mine(*, width: int = 64) -> nn.Module: ...

        csg_seg.save_compact(model, 'model.safetensors', source=dict(builder='mine', width=96))

    Args:
        name: the ``builder`` of a source; an earlier builder with this name is replaced.
    """

    def register(builder: Builder) -> Builder:
        BUILDERS[name] = builder
        return builder

    return register


def check_source(source: Source) -> None:
    """Check that a source can be written to a file and that its builder is registered.

    Raises:
        CSGError: it cannot, or there is no such builder.
    """
    check_form(source)
    _check_is_known(source['builder'])
    encode_source(source)


def check_form(source: Source) -> None:
    """Check that a source is a dict with the name of a builder.

    Raises:
        CSGError: it is not.
    """
    if not isinstance(source, Mapping) or not isinstance(source.get('builder'), str):
        raise CSGError(f"source must be a dict with 'builder', one of {_known()}; got {str(source)[:80]}")


def _check_is_known(name: str) -> None:
    if name not in BUILDERS:
        raise CSGError(
            f'there is no builder {name[:40]!r}, only {_known()}; register it with csg_seg.register_builder, or give '
            'the model'
        )


def encode_source(source: Source) -> str:
    """Encode a source as JSON; tuples become ``{"tuple": [...]}``, since some networks distinguish them from lists.

    Raises:
        CSGError: a value is not plain.
    """
    try:
        return json.dumps(_tag_tuples(source))
    except (TypeError, ValueError) as error:
        raise CSGError(f'source must hold plain values, which JSON can represent ({error})') from None


def decode_source(text: str) -> Any:
    """Decode the text of :func:`encode_source`."""
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
        most_values: the number of values that the network's tensors may hold together.

    Raises:
        CSGError: there is no such builder, it cannot build the network, or the network is too large.
    """
    check_form(source)
    _check_is_known(source['builder'])
    arguments = {key: value for key, value in source.items() if key != 'builder'}
    try:
        with nullcontext() if most_values is None else _Limit(most_values):
            return BUILDERS[source['builder']](**arguments)
    except CSGError:
        raise
    except ModuleNotFoundError as error:
        raise CSGError(f'the builder {source["builder"]!r} needs {error.name}; install it, or give the model') from None
    # A library may raise anything for arguments from a file.
    except Exception as error:
        what = f'{type(error).__name__}: {" ".join(str(error).split())[:200]}'
        raise CSGError(f'the builder {source["builder"]!r} cannot build the network ({what}); give the model') from None


# Held while nn.Module is patched: another thread must not restore what this one has patched. A builder must not wait
# for a thread that loads a network.
_PATCH = RLock()


@contextmanager
def parameters_on_meta() -> Iterator[None]:
    """Let modules that this thread builds have their parameters on the meta device; buffers stay real."""
    thread = get_ident()
    moved = WeakIdKeyDictionary()  # weak, so that real values are freed; a parameter registered twice stays one

    def register_on_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if type(parameter) is nn.Parameter and not parameter.is_meta and get_ident() == thread:
            if parameter not in moved:
                moved[parameter] = nn.Parameter(parameter.to('meta'), requires_grad=parameter.requires_grad)
            parameter = moved[parameter]
        register(module, name, parameter)

    with _PATCH:
        register = nn.Module.register_parameter
        nn.Module.register_parameter = register_on_meta  # type: ignore[method-assign, assignment]
        try:
            yield
        finally:
            nn.Module.register_parameter = register  # type: ignore[method-assign]


class _Limit(TorchFunctionMode):
    """Refuse to allocate more than a number of values, before they take memory."""

    def __init__(self, most_values: int):
        super().__init__()
        self.left = most_values

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        """Count the values requested from factories, and check the size of every other new result."""
        kwargs = kwargs or {}
        values = 0
        if func in FACTORIES:
            shape = kwargs.get('size', args[0] if args and isinstance(args[0], (tuple, list)) else args)
            values = math.prod(size for size in shape if isinstance(size, int) and size > 0)
            values = values**2 if func is torch.eye and len(shape) == 1 else values
            self.left -= values
            self._check(0)
        result = func(*args, **kwargs)
        is_argument = any(result is each for each in (*args, *kwargs.values()))  # as of functions that work in place
        if isinstance(result, Tensor) and result.numel() > values and not is_argument:
            self._check(result.numel())
        return result

    def _check(self, values: int) -> None:
        if values > self.left:
            raise CSGError('the network that the file names is far larger than the weights in it; copy the file again')


@register_builder('torchvision')
def build_torchvision(*, name: str, **arguments: Any) -> nn.Module:
    """Build a torchvision network by its function's name, such as 'resnet18' or 'deeplabv3_resnet50'."""
    models = import_module('torchvision.models')
    weights = ('weights', 'weights_backbone')
    _check_plain(name, arguments, refused=weights)
    accepted = models.get_model_builder(name).__annotations__
    return models.get_model(name, **{key: None for key in weights if key in accepted}, **arguments)


@register_builder('timm')
def build_timm(*, name: str, **arguments: Any) -> nn.Module:
    """Build a timm network by name, such as 'resnet18'; timm must be installed."""
    timm = import_module('timm')
    if not timm.is_model(name):  # create_model would also download from a hub
        raise CSGError(f'timm has no network {name[:80]!r}')
    _check_plain(name, arguments, refused=TIMM_FILES)
    return timm.create_model(name, pretrained=False, **arguments)


@register_builder('smp')
def build_smp(*, name: str, **arguments: Any) -> nn.Module:
    """Build a network of segmentation_models_pytorch by its class's name, such as 'Unet'; it must be installed."""
    _check_plain(name, arguments, refused=('encoder_weights', *TIMM_FILES))
    _check_local(arguments)  # 'tu-hf-hub:...' would download
    return import_module('segmentation_models_pytorch').create_model(name, encoder_weights=None, **arguments)


@register_builder('monai')
def build_monai(*, name: str, **arguments: Any) -> nn.Module:
    """Build a network of MONAI by the name of its class or function in monai.networks.nets; MONAI must be installed."""
    files = ('pretrained', 'pretrained_url', 'pretrained_state_dict_key', 'weights', 'weights_backbone')
    _check_plain(name, arguments, refused=files)
    _check_local(arguments)
    network: Any = getattr(import_module('monai.networks.nets'), name, None)
    is_class = isinstance(network, type) and issubclass(network, nn.Module)
    if not (is_class or re.fullmatch(MONAI_FUNCTIONS, name)) or name == 'Transchex':  # Transchex reads a checkpoint
        raise CSGError(f'monai.networks.nets has no network {name[:80]!r} that needs no other files')
    off = {'pretrained': False} if 'pretrained' in signature(network).parameters else {}
    return network(**off, **arguments)


@register_builder('transformers')
def build_transformers(*, name: str, config: Mapping[str, Any]) -> nn.Module:
    """Build an image network of transformers, which must be installed.

    Args:
        name: its class, such as 'SegformerForSemanticSegmentation'.
        config: its settings, ``model.config.to_diff_dict()``. Those of timm's networks are refused.
    """
    _check_plain(name, {})
    _check_local(
        config,
        refused=('auto_map', 'backbone', 'architecture', 'model_args', 'attn_implementation', '_attn_implementation'),
    )
    transformers = import_module('transformers')
    network: Any = getattr(transformers, name, None)
    is_class = isinstance(network, type) and issubclass(network, transformers.PreTrainedModel)
    inputs = network.main_input_name if is_class else ()
    if 'pixel_values' not in ([inputs] if isinstance(inputs, str) else inputs) or name.startswith('Timm'):
        raise CSGError(f'transformers has no network {name[:80]!r} that takes images')
    return network(network.config_class(**config))


@register_builder('mmengine')
def build_mmengine(**arguments: Any) -> nn.Module:
    """Import mmengine; :mod:`csg_seg.mm` is then imported too, and its builder takes the place of this one."""
    import_module('mmengine')
    if BUILDERS['mmengine'] is build_mmengine:
        raise CSGError('csg_seg.mm cannot be imported; csg-seg doctor says why')
    return BUILDERS['mmengine'](**arguments)


def _check_plain(name: str, arguments: Mapping[str, Any], *, refused: tuple[str, ...] = ()) -> None:
    if not isinstance(name, str):
        raise CSGError(f'the name of a network must be a string; got {str(name)[:40]}')
    for key in arguments:
        if key in refused:
            raise CSGError(f'{key} is not for files, which hold their own weights; leave it out')


def _check_local(value: Any, *, refused: tuple[str, ...] = ()) -> None:
    """Refuse, at any depth, text that may be a path or an address, and keys that make a library look for one."""
    if isinstance(value, Mapping):
        for key, each in value.items():
            if key in refused and each is not None:
                raise CSGError(f'{key} may make the library read files or connect; leave it out, or give the model')
            if key not in NOTES:
                _check_local(each, refused=refused)
    elif isinstance(value, (list, tuple)):
        for each in value:
            _check_local(each, refused=refused)
    elif isinstance(value, str) and re.search(r'[/\\:]', value):
        raise CSGError(f'{value[:80]!r} may be a path or an address, which files must not name; give the model')


def _known() -> str:
    return ', '.join(map(repr, BUILDERS))
