"""The bank of generators at a model's root, and the root's hooks around forward passes, saving and loading."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any, cast
from weakref import WeakSet, ref

import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.nn.parameter import UninitializedParameter
from torch.nn.utils.parametrize import is_parametrized
from torch.utils.hooks import RemovableHandle

from csg_seg.errors import CSGError
from csg_seg.generators.linear import Generator
from csg_seg.generators.products import is_recorded

from .accumulation import Accumulation
from .ahead import Ahead, drop
from .conv import DENSE_KINDS, CSGConv, check_fitted, generated_convs
from .loading import Loading
from .root import BANK, SHARING, Generators, check_rootable, enroot, uproot
from .state_dict_checks import StateDictChecks
from .watch import WATCH


class GeneratorBank(Generators):
    """The generators of a model, registered on its root under the name ``csg``; see :mod:`csg_seg.layers.root`.

    Attributes:
        left_dense: why a conv stayed dense, a :class:`csg_seg.retrofitting.selection.Reason` by name.
        layers: the generated layers by name, as :meth:`refresh` found them; the bank does not register them.
        ahead: makes weights ahead of forward passes, and caches them between evaluations.
        loading: fits weights that were loaded, and holds the settings of loading.
        reset: which layers the last load reset, as ``reset.layers``.
        accumulation: weights made once for several batches, in :meth:`accumulate`.
        hook_handles: of the bank's hooks on the root.
        keep_weights: whether weights are kept from one evaluation to the next. If False, memory holds one generated
            weight at a time, and each evaluation takes longer.
    """

    def __init__(self, generators: Iterable[Generator], left_dense: Mapping[str, object]):
        super().__init__(generators)
        self.left_dense = dict(left_dense)
        self.layers: dict[str, CSGConv] = {}
        self.ahead = Ahead()
        self.accumulation = Accumulation()
        self.loading = Loading(self)
        self.reset = self.loading.reset
        self.hook_handles: list[RemovableHandle] = []
        self.parts: WeakSet[nn.Module] = WeakSet()
        self._keep_weights = True
        self._changes = CSGConv.changes
        self._watched: tuple[bool, ...] | None = None  # which codes trained when the watch began

    @property
    def keep_weights(self) -> bool:
        """Whether weights are kept; anything but True and False raises CSGError."""
        return self._keep_weights

    @keep_weights.setter
    def keep_weights(self, keep: bool) -> None:
        if not isinstance(keep, bool):
            raise CSGError(f'keep_weights must be True or False; got {keep!r}')
        self._keep_weights = keep

    def fit_loaded(self) -> dict[str, float]:
        """Fit the dense weights that were loaded into parts of the network; return each layer's relative error."""
        errors = self.loading.fit_loaded()
        if errors:
            WATCH.note_loaded(self.layers.values())
        return errors

    def forward(self, input: Any) -> Any:
        """Return the input, so that a root whose forward calls all registered modules in turn still works."""
        return input

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the networks that this one is a slice of or was cut into: a copy has generators of its own.

        Networks that are copied together go on sharing their generators.
        """
        return {**self.__dict__, '_watched': None, '_whole': None, 'parts': None, 'is_sharing': self in SHARING}

    def __setstate__(self, state: dict[str, Any]) -> None:
        if state.pop('is_sharing', False):
            SHARING.add(self)
        super().__setstate__(state)
        self.parts = WeakSet()
        WATCH.begin(self.layers)

    def refresh(self, root: nn.Module) -> None:
        """Look up the root's generated layers, of which some may have been added, copied, renamed or removed.

        A copied layer has a copy of its generator; it shares the bank's generator again if the two are still equal.

        Raises:
            CSGError: a layer's generator is not in the bank.
        """
        self._changes = CSGConv.changes
        layers = dict(generated_convs(root))
        for name, conv in layers.items():
            if all(conv.generator is not generator for generator in self):
                self._adopt(name, conv)
        self.layers = layers
        for generator in self:
            generator.layers = {
                name: tuple(conv.weight_shape) for name, conv in layers.items() if conv.generator is generator
            }

    def _adopt(self, name: str, conv: CSGConv) -> None:
        """Let a copied layer share the generator of the bank that equals its own."""
        for generator in self:
            if same_generators(generator, conv.generator):
                object.__setattr__(conv, 'generator', generator)
                return
        raise CSGError(
            f"{name}: its generator is not this network's: the layer was taken from another network, or copied "
            'before training went on; copy a layer of the network as it is now, or materialise both'
        )

    def accumulate(self) -> AbstractContextManager[None]:
        """Generate the weights once for all batches inside, to accumulate gradients.

        The weights' gradients add up, and are sent through the generators when the block ends, so generation costs
        what it costs for one batch. Memory holds all weights and their gradients meanwhile. ::

            with model.csg.accumulate():
                for images, labels in batches:
                    loss(model(images), labels).backward()
            optimizer.step()

        Gradients of codes and generators appear at the end of the block, so scale, clip or clear gradients and step
        the optimizer afterwards, and write to no parameter inside. In a compiled graph, weights are generated for each
        batch. Under ``DistributedDataParallel``, run the last batch after the block, because gradients are exchanged
        in its backward pass; run the others in ``no_sync()`` as well.

        Raises:
            CSGError: an optimizer steps inside the block, a backward pass is missing in it, autocast differs between
                batches, blocks are nested, or the parameters are sharded.
        """
        return self.accumulation.block(self, self.layers)

    def take_generators(self, generators: Iterable[Generator]) -> None:
        """Use other generators, and watch again: an optimizer may hold the earlier ones."""
        super().take_generators(generators)
        self._watched = ()

    def share_with(self, root: nn.Module) -> None:
        """Give the generators to a second root too, such as a slice of a container."""
        bank = GeneratorBank(self, {})
        whole = self.whole()
        whole = self if whole is None else whole
        bank._whole = ref(whole)
        whole.parts.add(root)
        bank.loading.keep_generators = True  # a fit of the part must not change the rest
        attach_bank(root, bank)

    def prepare_pass(self, root: nn.Module) -> None:
        """Find new layers before a forward pass of the root, watch the first steps, and make weights ahead."""
        self.reset.is_on = False
        drop(self.layers)  # of a pass that was interrupted
        trains = torch.is_grad_enabled()
        if WATCH.lost and not trains:
            WATCH.warn_of_lost(self.layers.values(), stacklevel=6)  # where the network is called
        may_be_new = (trains and self._watched is None) or self._changes != CSGConv.changes
        if may_be_new or any(conv.generator not in self._modules.values() for conv in self.layers.values()):
            self.refresh(root)
        trainable = tuple(conv.code.requires_grad for conv in self.layers.values()) if trains else self._watched
        if trainable != self._watched:  # training begins, or layers were frozen or unfrozen
            check_exchanged(root, self.layers)
            WATCH.begin(self.layers, root, again=self._watched is not None)
            self._watched = trainable
        elif WATCH.is_over:
            WATCH.end()
        if self.accumulation.is_on and torch.is_grad_enabled():
            self.accumulation.provide(self, self.layers)
        elif self.keep_weights or torch.is_grad_enabled():
            self.ahead.make(self, self.layers)
        else:
            self.ahead.cached.clear()

    def train(self, mode: bool = True) -> Any:
        """Set the mode; training clears the cached weights."""
        if mode:
            self.ahead.cached.clear()
        return super().train(mode)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Move or cast the generators, and clear the cached weights."""
        self.unshare()
        self.ahead.cached.clear()
        return super()._apply(fn, recurse)


def find_bank(model: nn.Module) -> GeneratorBank | None:
    """Return the bank of a retrofitted root, None for any other module."""
    bank = model._modules.get(BANK)
    return bank if isinstance(bank, GeneratorBank) else None


def bank_of(root: nn.Module) -> GeneratorBank:
    """Return the bank of a module that is known to be a retrofitted root."""
    return cast(GeneratorBank, root._modules[BANK])


def inner_root(model: nn.Module) -> str | None:
    """Return the name of the first retrofitted network in a model, such as 'module'; None if there is none."""
    return next((prefix.removesuffix('.') for prefix, _, _ in find_roots(model)), None)


def other_network(model: nn.Module) -> str:
    """Say which network to give in place of a model that holds, or is a part of, a retrofitted one; '' if neither."""
    inside = inner_root(model)
    if inside is not None:
        return f'the retrofitted network is inside this {type(model).__name__}; give model.{inside}'
    is_part = any(generated_convs(model))
    return f'this {type(model).__name__} is a part of a retrofitted network; give the whole network' if is_part else ''


def find_roots(model: nn.Module) -> Iterator[tuple[str, nn.Module, GeneratorBank]]:
    """Yield each retrofitted root in a model, itself included: the prefix of its names, the root, its bank."""
    for name, module in model.named_modules():
        bank = find_bank(module)
        if bank is not None:
            bank.refresh(module)
            yield f'{name}.' if name else '', module, bank


def check_module(given: object, called: str) -> None:
    """Refuse what is not a module, such as a path in its place.

    Args:
        given: as a network.
        called: how the error begins, such as 'summarise: the network'.

    Raises:
        CSGError: it is another object.
    """
    if not isinstance(given, nn.Module):
        raise CSGError(f'{called} is an object of type {type(given).__name__}, not a module')


def check_exchanged(root: nn.Module, layers: Mapping[str, CSGConv]) -> None:
    """Refuse to train a root in a ``DistributedDataParallel`` that holds no code: ranks would drift apart.

    Raises:
        CSGError: the wrapper is older than the layers.
    """
    wrapper = nn.parallel.DistributedDataParallel._get_active_ddp_module()
    if wrapper is None or all(module is not root for module in wrapper.modules()):
        return
    codes = {id(conv.code) for conv in layers.values() if conv.code.requires_grad}
    if codes and codes.isdisjoint(map(id, wrapper._module_parameters)):
        raise CSGError(
            'the DistributedDataParallel wrapper was made before retrofit, and would exchange no gradients of codes; '
            'wrap the network again'
        )


def check_root(model: nn.Module) -> None:
    """Check that a model can be retrofitted.

    Raises:
        CSGError: it is not a plain module, has lazy or sharded parameters, or is wrapped, compiled or already
            retrofitted.
    """
    if not isinstance(model, nn.Module) or isinstance(model, (torch.jit.ScriptModule, GraphModule)):
        kind = 'a class' if isinstance(model, type) else f'an object of type {type(model).__name__}'
        raise CSGError(f'{kind} cannot be retrofitted; give a network, an nn.Module that is not scripted or traced')
    for name, parameter in model.named_parameters():
        if isinstance(parameter, UninitializedParameter):
            raise CSGError(f'{name} has no shape before the first batch; run one batch through the model first')
        if hasattr(parameter, 'device_mesh'):  # a DTensor, whose import takes a second
            raise CSGError(f'{name} is sharded; retrofit the model before fully_shard')
    if isinstance(model, DENSE_KINDS):
        raise CSGError(f'a single {type(model).__name__} cannot be retrofitted; give a network that has it as a layer')
    if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        kind = type(model).__name__
        raise CSGError(f'the model is already wrapped in {kind}; give the network inside, model.module, and wrap again')
    if getattr(model, '_orig_mod', None) is not None:
        raise CSGError('the model is already compiled; give the network inside, model._orig_mod, and compile it again')
    if find_bank(model) is not None or any(generated_convs(model)):
        if not any(find_roots(model)):
            raise CSGError(f'this {type(model).__name__} is a part of a retrofitted network; materialise that first')
        raise CSGError('the model is already retrofitted; materialise it first')
    if BANK in dir(model):  # also where __getattr__ answers for every name
        raise CSGError(f'the model has an attribute named {BANK!r}, which the generators need; rename that attribute')
    check_unparametrised(model, 'retrofit a module that holds it')
    check_rootable(model)


def attach_bank(root: nn.Module, bank: GeneratorBank) -> None:
    """Register the bank and its hooks on the root."""
    enroot(root, bank)
    bank.refresh(root)
    bank.hook_handles = [
        root.register_state_dict_pre_hook(refresh_before_save),
        root._register_load_state_dict_pre_hook(check_before_load, with_module=True),
        root.register_load_state_dict_post_hook(fit_after_load),
        root.register_forward_pre_hook(begin_pass),
        root.register_forward_hook(end_pass, always_call=True),
    ]
    WATCH.begin(bank.layers, root)


def check_unparametrised(root: nn.Module, remedy: str) -> None:
    """Refuse a root with parametrised parameters of its own: parametrisation and retrofit both change its class."""
    if is_parametrized(root):
        raise CSGError(f'a parameter of this {type(root).__name__} itself is parametrised; {remedy}')


def detach_bank(root: nn.Module) -> None:
    """Undo :func:`attach_bank`."""
    for handle in bank_of(root).hook_handles:
        handle.remove()
    uproot(root)


def detach_unused(bank: GeneratorBank) -> None:
    """Detach the banks of slices of a network that have no generated layer any more."""
    for part in [*bank.parts]:
        if not any(generated_convs(part)):
            bank.parts.discard(part)
            if find_bank(part) is not None:
                detach_bank(part)


def begin_pass(root: nn.Module, inputs: Any) -> None:
    """Prepare the pass; in a compiled graph, each layer generates its own weight."""
    if not is_recorded():
        bank_of(root).prepare_pass(root)


def end_pass(root: nn.Module, inputs: Any, outputs: Any) -> None:
    """Drop the weights made ahead."""
    bank = bank_of(root)
    if not (is_recorded() or bank.accumulation.is_on):
        drop(bank.layers)


def refresh_before_save(root: nn.Module, prefix: str, keep_vars: bool) -> None:
    """Check that all layers can be saved."""
    bank = bank_of(root)
    bank.refresh(root)
    check_fitted(bank.layers.values())


def check_before_load(root: nn.Module, state_dict: dict[str, Tensor], prefix: str, *_: object) -> None:
    """Refuse a state dict that does not fit the generated layers, before anything is copied."""
    bank = bank_of(root)
    bank.refresh(root)
    drop(bank.layers)  # of a forward pass that was interrupted
    bank.unshare()
    bank.loading.forget_loaded()
    StateDictChecks(root, bank, bank.reset, state_dict, prefix).run()


def fit_after_load(root: nn.Module, incompatible_keys: Any) -> None:
    """Fit loaded dense weights, and draw codes for the layers that were reset."""
    bank = bank_of(root)
    bank.fit_loaded()
    WATCH.note_loaded(bank.layers.values())
    bank.loading.draw_codes(bank.reset.layers)


def same_generators(one: Generator, other: Generator) -> bool:
    """Whether two generators have equal settings and values, in any dtype and on any device."""
    if one.settings != other.settings:
        return False
    pairs = zip(_tensors(one), _tensors(other), strict=True)
    # One of the two may have been moved or cast since.
    return all(
        each.shape == twin.shape if each.is_meta and twin.is_meta else torch.equal(each, twin.to(each))
        for each, twin in pairs
    )


def _tensors(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]
