"""The root of a retrofitted network: the generators are its own, and no layer of it.

The bank is registered under the name :data:`BANK`, so a state dict holds each generator once and all parameters are
found. But whoever goes through a network by ``children()``, indices, slices and lengths finds the layers of the dense
network alone: what takes, drops or replaces its last layer does the same as before. As nobody may miss the generators
that way, their parameters are the root's own: ``root.named_parameters(recurse=False)`` has them, by which optimizers'
recipes, FSDP2 and others find what is in no child.

Registered on a layer that it feeds, a generator would be lost with that layer, and FSDP2 would free it with that
layer's block while other blocks need it.
"""

import copyreg
import types
from collections.abc import Callable, Iterator
from typing import Any, cast

from torch import Tensor, nn

from .conv import generated_convs
from .errors import CSGError

BANK = 'csg'
CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
# Of a container, what is not about its items.
NOT_ITEMS = {'__init__', '__repr__', '__dir__', '__iter__', 'forward'}


class CSGRoot(nn.Module):
    """What the class of a root gets in front of its own methods when the network is retrofitted.

    Attributes:
        bare_kind: the class that the root had.
    """

    bare_kind: type[nn.Module]

    def named_children(self) -> Iterator[tuple[str, nn.Module]]:
        """Yield the children of the dense network; ``children()`` does so too."""
        return ((name, child) for name, child in super().named_children() if name != BANK)

    def named_parameters(
        self, prefix: str = '', recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield the parameters; without ``recurse`` the root's own, to which those of its generators belong.

        Who asks for duplicates goes through all modules, and finds them in the bank.
        """
        yield from super().named_parameters(prefix, recurse, remove_duplicate)
        if remove_duplicate and not recurse:
            yield from _bank(self).named_parameters(_join(prefix))

    def named_buffers(
        self, prefix: str = '', recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, Tensor]]:
        """Yield the buffers, likewise."""
        yield from super().named_buffers(prefix, recurse, remove_duplicate)
        if remove_duplicate and not recurse:
            yield from _bank(self).named_buffers(_join(prefix))

    def apply(self, fn: Callable[[nn.Module], None]) -> Any:
        """Apply a function to all modules, generators included."""
        _bank(self).apply(fn)
        return super().apply(fn)

    def train(self, mode: bool = True) -> Any:
        """Set the mode of all modules, generators included."""
        _bank(self).train(mode)
        return super().train(mode)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Any:
        """Move or cast all modules, generators included."""
        if recurse:
            _bank(self).refresh(self)
            _bank(self)._apply(fn)
        return super()._apply(fn, recurse)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickle and copy by the class that the root had: its own is made at run time."""
        make, arguments, *rest = cast(tuple, super().__reduce_ex__(protocol))
        if make is copyreg.__newobj__:  # type: ignore[attr-defined]
            arguments = (self.bare_kind, *arguments[1:])
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
        CSGError: says why.
    """
    kind = type(model)
    try:
        model.__class__ = rooted_kind(kind)
        model.__class__ = kind
    except TypeError as error:
        raise CSGError(
            f'the class {kind.__name__} cannot be extended at run time ({error}); retrofit a module that holds it'
        ) from None


def uproot(root: nn.Module) -> None:
    """Undo :func:`enroot`."""
    root._modules.pop(BANK)
    root.__class__ = root.bare_kind  # type: ignore[assignment]


_kinds: dict[type[nn.Module], type[nn.Module]] = {}


def rooted_kind(kind: type[nn.Module]) -> type[nn.Module]:
    """Return the class of roots that behave as the given class otherwise, its name included."""
    if kind not in _kinds:
        body: dict[str, Any] = {key: getattr(kind, key) for key in ('__module__', '__qualname__', '__doc__')}
        body['bare_kind'] = kind
        if hasattr(kind, 'init_weights'):
            body['init_weights'] = _init_weights
        for container in CONTAINERS:
            if issubclass(kind, container):
                body['__iter__'] = _iterate
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


def _join(prefix: str) -> str:
    return f'{prefix}.{BANK}' if prefix else BANK


def _init_weights(self: Any, *args: Any, **kwargs: Any) -> Any:
    """Initialise the network as its own class does, and fit what was loaded into parts of it."""
    _bank(self).begin_init()
    result = super(CSGRoot, self).init_weights(*args, **kwargs)  # type: ignore[misc]
    _bank(self).init_weights()
    return result


def _iterate(self: Any) -> Iterator[Any]:
    """Iterate over a container; one that is compiled can do no more than this."""
    items = {name: each for name, each in self._modules.items() if name != BANK}
    return iter(items if isinstance(self, nn.ModuleDict) else items.values())


def _without_bank(name: str) -> Callable[..., Any]:
    """Return a method of a container that is about the items of the dense network alone."""

    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        bank = _bank(self)
        items = {key: each for key, each in self._modules.items() if key != BANK}
        dense = object.__new__(self.bare_kind)
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
