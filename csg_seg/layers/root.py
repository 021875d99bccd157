"""The root of a retrofitted network, which owns the generators.

The bank is registered under the name :data:`BANK`, so a state dict holds each generator once and all parameters are
found. But ``children()``, indices, slices and lengths are those of the dense network, so code that takes, removes or
replaces its last layer works as before. ``root.named_parameters(recurse=False)`` lists the generators' parameters as
the root's own, where optimizers' recipes and FSDP2 find them.

A generator registered on one of its layers would be lost with that layer, and FSDP2 would free it with that layer's
block while other blocks need it.
"""

import copyreg
import types
from collections.abc import Callable, Iterable, Iterator, Mapping
from copy import deepcopy
from typing import Any, cast
from weakref import ReferenceType, WeakSet

from torch import Tensor, nn

from csg_seg.errors import CSGError
from csg_seg.generators.linear import Generator

from .conv import BANK, CSGConv, generated_convs

CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
# Methods of a container that do not concern its items.
NOT_ITEMS = {'__init__', '__repr__', '__dir__', '__iter__', 'forward'}


class Generators(nn.ModuleList):
    """Generators and the layers that use them; the base class of the bank.

    Attributes:
        layers: the layers by name.
        parts: slices of the network, which have the same generators.
    """

    layers: dict[str, CSGConv]
    parts: WeakSet[nn.Module]
    _whole: 'ReferenceType[Generators] | None' = None

    def __iter__(self) -> Iterator[Generator]:
        return cast(Iterator[Generator], super().__iter__())

    def whole(self) -> 'Generators | None':
        """Return the bank of the network that this is a slice of, None if there is none or it is gone."""
        return None if self._whole is None else self._whole()

    @property
    def is_shared(self) -> bool:
        """Whether other networks hold the generators too, see :func:`csg_seg.share_generators`."""
        own = {*self}
        others = (each for each in SHARING if each is not self and each is not self.whole())
        return any(generator in own for each in others for generator in each)

    def take_generators(self, generators: Iterable[Generator]) -> None:
        """Use other generators in place of the bank's own, which they equal."""
        taken = list(generators)
        for position, (own, other) in enumerate(zip(list(self), taken, strict=True)):
            for conv in self.layers.values():
                if isinstance(conv, CSGConv) and conv.generator is own:  # it may have been materialised with a slice
                    object.__setattr__(conv, 'generator', other)
            self[position] = other
        for part in self.parts:
            if BANK in part._modules:
                _bank(part).take_generators(taken)

    def unshare(self) -> None:
        """Take copies of generators that other networks hold too, before they change."""
        whole = self.whole()
        if whole is not None:
            whole.unshare()
        elif self.is_shared:
            self.take_generators([deepcopy(each) for each in self])


# Banks whose generators other networks may hold.
SHARING: WeakSet[Generators] = WeakSet()


class CSGRoot(nn.Module):
    """Mixin placed before a root's class when the network is retrofitted.

    Attributes:
        _bare_kind: the class that the root had.
    """

    _bare_kind: type[nn.Module]

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        """Make a dense network, for code that asks a retrofitted one for its class."""
        return cls._bare_kind(*args, **kwargs)

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Skip the dense class's own ``__init_subclass__``, which may register subclasses."""

    def named_children(self) -> Iterator[tuple[str, nn.Module]]:
        """Yield the children of the dense network; ``children()`` does so too."""
        return ((name, child) for name, child in super().named_children() if name != BANK)

    def named_parameters(
        self, prefix: str = '', recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield the parameters; without ``recurse``, the root's own, which include those of its generators.

        Callers with ``remove_duplicate=False`` visit every module, so they find them in the bank.
        """
        yield from super().named_parameters(prefix, recurse, **_unless_default(remove_duplicate))
        if remove_duplicate and not recurse:
            yield from _bank(self).named_parameters(_join(prefix))

    def named_buffers(
        self, prefix: str = '', recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, Tensor]]:
        """Yield the buffers; without ``recurse``, the root's own, which include those of its generators."""
        yield from super().named_buffers(prefix, recurse, **_unless_default(remove_duplicate))
        if remove_duplicate and not recurse:
            yield from _bank(self).named_buffers(_join(prefix))

    def apply(self, fn: Callable[[nn.Module], None], *args: Any, **kwargs: Any) -> Any:
        """Apply a function to all modules, generators included."""
        _bank(self).apply(fn)
        return super().apply(fn, *args, **kwargs)

    def train(self, mode: bool = True, *args: Any, **kwargs: Any) -> Any:
        """Set the mode of all modules, generators included."""
        _bank(self).train(mode)
        return super().train(mode, *args, **kwargs)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Any:
        """Move or cast all modules, generators included."""
        if not recurse:
            return super()._apply(fn, recurse)
        _bank(self).refresh(self)
        _bank(self)._apply(fn)
        return super()._apply(fn)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickle and copy by the class that the root had, because its own is created at run time."""
        make, arguments, *rest = cast(tuple, super().__reduce_ex__(protocol))
        if make is copyreg.__newobj__:  # type: ignore[attr-defined]
            arguments = (self._bare_kind, *arguments[1:])
        return _make_root, (make, arguments), *rest


def enroot(root: nn.Module, bank: nn.Module) -> None:
    """Register the bank as the first child of a module, which becomes a :class:`CSGRoot`."""
    root.__class__ = rooted_kind(type(root))
    others = dict(root._modules)
    root._modules.clear()
    root._modules.update({BANK: bank, **others})


def check_rootable(model: nn.Module) -> None:
    """Refuse a module whose class cannot be extended.

    Raises:
        CSGError: the class cannot be extended.
    """
    kind = type(model)
    try:
        model.__class__ = rooted_kind(kind)
        model.__class__ = kind
    # A metaclass may raise anything.
    except Exception as error:
        raise CSGError(
            f'the class {kind.__name__} cannot be extended at run time ({error}); retrofit a module that holds it'
        ) from None


def refresh_layers(root: CSGRoot) -> Mapping[str, CSGConv]:
    """Look up a root's generated layers, and return them by name."""
    _bank(root).refresh(root)
    return _bank(root).layers


def uproot(root: nn.Module) -> None:
    """Undo :func:`enroot`."""
    root._modules.pop(BANK)
    root.__class__ = root._bare_kind  # type: ignore[assignment]


_kinds: dict[type[nn.Module], type[nn.Module]] = {}


def rooted_kind(kind: type[nn.Module]) -> type[nn.Module]:
    """Return the class of roots that otherwise behave like the given class, and have its name."""
    if kind not in _kinds:
        body: dict[str, Any] = {key: getattr(kind, key) for key in ('__module__', '__qualname__', '__doc__')}
        body['_bare_kind'] = kind
        if hasattr(kind, 'init_weights'):
            body['init_weights'] = _init_weights
        for container in CONTAINERS:
            if issubclass(kind, container):
                body['__iter__'] = _iterate if kind.__iter__ is container.__iter__ else _without_bank('__iter__')
                methods = [name for name, each in vars(container).items() if callable(each) and name not in NOT_ITEMS]
                body |= {name: _without_bank(name) for name in methods}
        _kinds[kind] = types.new_class(kind.__name__, (CSGRoot, kind), exec_body=lambda space: space.update(body))
    return _kinds[kind]


def _make_root(make: Callable[..., nn.Module], arguments: tuple[Any, ...]) -> nn.Module:
    root = make(*arguments)
    root.__class__ = rooted_kind(type(root))
    return root


def _bank(root: Any) -> Any:
    return root._modules[BANK]


def _unless_default(remove_duplicate: bool) -> dict[str, bool]:
    """Return the argument unless it is the default: methods written for older PyTorch versions do not have it."""
    return {} if remove_duplicate else {'remove_duplicate': False}


def _join(prefix: str) -> str:
    return f'{prefix}.{BANK}' if prefix else BANK


def _init_weights(self: Any, *args: Any, **kwargs: Any) -> Any:
    """Initialise the network as its own class does, then fit dense weights of parts of it."""
    if not getattr(self, '_is_init', False):  # mmengine initialises once
        _bank(self).loading.begin_init()
    result = super(CSGRoot, self).init_weights(*args, **kwargs)  # type: ignore[misc]
    _bank(self).loading.end_init()
    _bank(self).fit_loaded()
    return result


def _iterate(self: Any) -> Iterator[Any]:
    """Iterate over a container in a way that torch.compile can trace."""
    items = {name: each for name, each in self._modules.items() if name != BANK}
    return iter(items if isinstance(self, nn.ModuleDict) else items.values())


def _without_bank(name: str) -> Callable[..., Any]:
    """Return a container's method that sees only the items of the dense network."""

    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        bank = _bank(self)
        items = {key: each for key, each in self._modules.items() if key != BANK}
        dense = object.__new__(self._bare_kind)
        dense.__dict__.update(self.__dict__, _modules=dict(items))
        result = getattr(dense, name)(*args, **kwargs)
        left = dense.__dict__.pop('_modules')
        if [*left.items()] != [*items.items()]:
            self.__dict__.update(dense.__dict__, _modules={BANK: bank, **left})
        if result is dense:
            return self
        is_new = isinstance(result, CONTAINERS) and all(result is not each for each in items.values())
        if is_new and any(generated_convs(result)):
            bank.share_with(result)
        return result

    method.__name__ = name
    return method
