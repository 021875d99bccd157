"""Save a network as a compact checkpoint, and load it: generators once, codes, and everything else, in one file."""

import json
import math
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from sys import getrefcount

import torch
from torch import Tensor, nn

from csg_seg.errors import CSGError
from csg_seg.generators.settings import read_patterns
from csg_seg.layers.bank import bank_of, check_module, find_bank, other_network
from csg_seg.layers.conv import check_finite, check_plain, find_convs, generated_convs
from csg_seg.layers.watch import WATCH
from csg_seg.retrofitting.selection import Cause, Reason
from csg_seg.retrofitting.surgery import swap_layers
from csg_seg.retrofitting.weights import dense_shapes
from csg_seg.version import __version__

from .builders import Source, build, check_source, encode_source, parameters_on_meta
from .format import Compact, is_counter, is_setting, parse, read_base, read_compact, write_file
from .matching import check_fits, check_shapes, generated_layers, load_values, shapes_of
from .precision import lower, matrices
from .updates import Content

# While the network of a file is built, it may allocate this many times the values of its weights: some networks are cut
# out of larger ones, a PSPNet's encoder out of a VGG-11 with 14 times its values.
SLACK = 16
# And always this many, 64 MB in float32: a small network may be cut out of one of ordinary size.
ALWAYS = 2**24
# Endings of files that torch.save writes.
PICKLES = ('.pth', '.pt', '.ckpt', '.bin')


def save_compact(
    model: nn.Module,
    path: str | os.PathLike,
    *,
    dtype: str | None = None,
    source: Source | None = None,
    base: str | os.PathLike | None = None,
) -> None:
    """Save a retrofitted model as a compact checkpoint.

    The file appears whole or not at all; an existing file is replaced.

    Args:
        model: a retrofitted network.
        path: the file to write, ``*.safetensors``.
        dtype: precision of codes, generators, and weights of convs and linear layers: 'float32' (unchanged),
            'float16', 'bfloat16', or 'int8' with a scale for each row. Norm layers, biases and buffers are unchanged.
            By default that of ``base``, or 'float32'.
        source: how to build the dense network, so that the file is sufficient on its own:
            ``dict(builder='torchvision', name='resnet18', num_classes=10)``, also 'timm', 'smp', 'monai',
            'transformers' or your own builder (:func:`csg_seg.register_builder`). By default that of ``base``, if it
            builds this network.
        base: another compact checkpoint. The file becomes an update: it holds only what differs from the base, and
            is loaded together with it.

    Raises:
        CSGError: the model is not retrofitted, the source builds another network, a value is not finite or does not
            fit the dtype, a code or generator is pruned or parametrised, the base is not a whole compact checkpoint or
            that of another network, or the file cannot have this name.
        FileNotFoundError: there is no such base.
    """
    check_module(model, 'save_compact(model, path): the model')
    convs = dict(generated_convs(model))
    check_plain(convs)
    WATCH.warn_of_lost(convs.values(), stacklevel=2)
    if source is not None:
        built = build(source)
        try:
            _check_same(built, model)
        except CSGError as error:
            raise CSGError(f'the source builds another network: {error}') from None
    write_compact(model, model.state_dict(), path, dtype=dtype, source=source, base=base)


def _check_same(built: nn.Module, model: nn.Module) -> None:
    """Refuse a dense network whose names, shapes, or settings of convs are not those of a retrofitted model."""
    remedy = 'correct name or arguments in source'
    check_shapes(shapes_of(built.state_dict()), dense_shapes(model), remedy, 'that network')
    own = find_convs(model, remove_duplicate=False)
    for name, conv in find_convs(built, remove_duplicate=False).items():
        for key in ('stride', 'padding', 'dilation', 'groups', 'padding_mode'):
            wanted, got = (getattr(each, key) for each in (own.get(name, conv), conv))
            if got != wanted:
                raise CSGError(f'{name} has {key} {got}, the model has {wanted}; {remedy}')


def load_compact(
    path: str | os.PathLike,
    model: nn.Module | None = None,
    *,
    base: str | os.PathLike | None = None,
    reset: str | Sequence[str] = (),
    keep_weights: bool | None = None,
) -> nn.Module:
    """Load a compact checkpoint into a model, which is unchanged if they do not fit.

    Args:
        path: a file written by :func:`save_compact`.
        model: the dense network, which is retrofitted as the file says, or a retrofitted one. A network on the meta
            device takes over the file's tensors, on the CPU. Without a model, the network is built as the file says;
            that reads no other file and runs no code from the file.
        base: of an update, the file that it was made from, if that is not beside it under its original name.
        reset: patterns of layers that keep their start values where the file does not fit them, see
            :func:`csg_seg.load_state_dict`; ``model.csg.reset.layers`` then lists them.
        keep_weights: whether the network keeps its generated weights from one evaluation to the next. If False,
            memory holds one of them at a time, and each evaluation takes longer. By default as the model says, True
            for a new one; ``model.csg.keep_weights`` can change it later.

    Returns:
        The same model, or the one built.

    Raises:
        FileNotFoundError: there is no such file, or no such base.
        CSGError: the file is damaged or not a compact checkpoint, its settings, names or shapes differ from the
            model's (seeds of binary generators may differ; the file's are used), it does not say how to build the
            network, or the base of an update is not beside it or is another file.
    """
    if model is not None:
        check_module(model, 'load_compact(path, model): the model')
    if keep_weights not in (None, True, False):
        raise CSGError(f'load_compact: keep_weights must be True, False or None; got {keep_weights!r}')
    compact = read_compact(path, base)
    patterns = read_patterns('load_compact', 'reset', reset) or ()
    try:
        loaded = _build_and_fill(compact, patterns) if model is None else None
        if loaded is None:
            loaded = _fill(_build(compact) if model is None else model, compact, patterns)
    except CSGError as error:
        raise CSGError(f'{path}: {error}') from None
    if keep_weights is not None:
        bank_of(loaded).keep_weights = keep_weights
    return loaded


def _fill(model: nn.Module, compact: Compact, reset: Sequence[str]) -> nn.Module:
    """Retrofit a model as a file says, unless it is, and load the file's values."""
    layers = check_fits(model, compact, reset)
    if find_bank(model) is None:
        taken = {name: position for name, (position, _) in layers.items()}
        left_dense = {name: Reason(Cause.DENSE_IN_FILE) for name in find_convs(model) if name not in layers}
        swap_layers(model, compact.settings, taken, left_dense)
    load_values(model, compact, reset)
    return model


def _build_and_fill(compact: Compact, reset: Sequence[str]) -> nn.Module | None:
    """Build a file's network with parameters on the meta device, where they take no memory or time, and fill it.

    Returns:
        the network on the CPU; None if some of its parameters are not in the file, have attributes or hooks, are
        used in another way than as parameters, or if another device is the default one.
    """
    if torch.get_default_device().type != 'cpu':
        return None
    try:
        with parameters_on_meta():
            model = _build(compact)
        if _are_marked(model):
            return None
        _fill(model, compact, reset)
    except CSGError:
        return None
    is_whole = not any(each.is_meta for each in (*model.parameters(), *model.buffers()))
    return model if is_whole and not any(map(_holds_no_values, model.modules())) else None


def _are_marked(model: nn.Module) -> bool:
    """Whether a parameter has a class, a hook or an attribute that the loaded one would lack, or is referred to."""
    probe = nn.Parameter(torch.empty(0))
    counted_twice = getrefcount(probe)  # by the variable and the call
    places = Counter(id(each) for module in model.modules() for each in module._parameters.values())
    for module in model.modules():
        for name in module._parameters:
            parameter = module._parameters[name]
            if parameter is None:
                continue
            others = getrefcount(parameter) - counted_twice - places[id(parameter)]
            hooks = parameter._backward_hooks or parameter._post_accumulate_grad_hooks
            if type(parameter) is not nn.Parameter or hooks or vars(parameter) or others > 0:
                return True
    return False


def _holds_no_values(module: nn.Module) -> bool:
    """Whether a module keeps a tensor on the meta device, made of a parameter, that is not registered."""
    for value in vars(module).values():
        if isinstance(value, (list, tuple, Tensor)):
            values = [value] if isinstance(value, Tensor) else value
            if any(isinstance(each, Tensor) and each.is_meta for each in values):
                return True
    return False


def write_compact(
    model: nn.Module,
    state_dict: Mapping[str, Tensor],
    path: str | os.PathLike,
    *,
    dtype: str | None = None,
    source: Source | None = None,
    metadata: Mapping[str, str] | None = None,
    base: str | os.PathLike | None = None,
) -> None:
    """Write a state dict of a retrofitted model, such as an average of its weights; see :func:`save_compact`.

    Args:
        model: provides settings and layers.
        state_dict: its entries.
        path: the file to write.
        dtype: as for :func:`save_compact`.
        source: as for :func:`save_compact`; one that is given is not checked by building it.
        metadata: notes to keep in the file, text by name.
        base: as for :func:`save_compact`.
    """
    bank = find_bank(model)
    if bank is None:
        said = 'the model is not retrofitted; call csg_seg.retrofit on it, or use torch.save'
        raise CSGError(f'nothing to save: {other_network(model) or said}')
    path = Path(path)
    _check_path(Path(os.path.realpath(path)), base)  # a symbolic link is written through
    for name, tensor in state_dict.items():
        if not isinstance(tensor, Tensor):
            raise CSGError(f'{name}: a {type(tensor).__name__} in the state dict, not a tensor; save it separately')
        if tensor.is_meta:
            raise CSGError(f'{name}: on the meta device, without values to save; load some first')
    old = None if base is None else read_base(base)
    dtype = dtype or (old.header.get('dtype', 'float32') if old else 'float32')
    if old is not None and source is None:
        source = _source_of(old, model)
    header = {
        'versions': json.dumps({'csg_seg': __version__, 'torch': torch.__version__}),
        **(metadata or {}),
        'dtype': dtype,
        'generators': json.dumps([generator.settings.to_dict() for generator in bank]),
        'layers': json.dumps(generated_layers(model)),
    }
    if source is not None:
        check_source(source)
        header['source'] = encode_source(source)
    stored = {name: each for name, each in state_dict.items() if not (is_setting(name) or is_counter(name))}
    _check_trained(model, stored)
    lowered = lower(stored, matrices(model), dtype)
    if old is not None and not any(
        name in old.tensors and each.shape == old.tensors[name].shape for name, each in lowered.items()
    ):
        raise CSGError(f'{base}: holds another network; leave base out')
    write_file(path, lowered, header, old)


def _check_path(path: Path, base: str | os.PathLike | None) -> None:
    """Refuse a path that is no place for a compact file, or is that of the base of an update."""
    if path.suffix in PICKLES:
        raise CSGError(f'{path}: a compact checkpoint is a safetensors file; name it {path.stem}.safetensors')
    if not path.parent.is_dir():
        raise CSGError(f'{path.parent}: no such folder; create it before saving {path.name}')
    if path.is_dir():
        raise CSGError(f'{path}: a folder, not a file; choose another path')
    if path.exists() and not path.is_file():
        raise CSGError(f'{path}: a device or pipe, not a file; choose another path')
    if base is not None and path.exists() and path.samefile(base):
        raise CSGError(f'{path}: the update would replace its base; choose another path')


def _check_trained(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Refuse parameters that cannot be stored under their names, and NaN and infinity in parameters and statistics."""
    trained = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    for name in filter(is_counter, trained):
        raise CSGError(f"{name}: the name of a profiler's counter, which files do not hold; rename this parameter")
    for name, each in tensors.items():  # other buffers, such as masks, may hold infinity
        if name in trained or name.endswith(('running_mean', 'running_var')):
            check_finite(name, each)


def _source_of(base: Content, model: nn.Module) -> Source | None:
    """Return how the network of a base is built, if that is the network of a retrofitted model."""
    compact = parse(base.name, base)
    if compact.source is None:
        return None
    try:
        with parameters_on_meta():
            built = _build(compact)
    except CSGError:  # a network may compute with its parameters while it is built
        built = _build(compact)
    try:
        _check_same(built, model)
    except CSGError:
        return None
    return compact.source


def _build(compact: Compact) -> nn.Module:
    """Build the network of a file, limiting its memory to what the file accounts for."""
    if compact.source is None:
        raise CSGError('does not say how its network is built; give load_compact the model too')
    stored = sum(tensor.numel() for tensor in compact.tensors.values())
    dense = sum(math.prod(shape) for _, shape in compact.layers.values())
    return build(compact.source, most_values=max(ALWAYS, SLACK * (stored + dense)))
