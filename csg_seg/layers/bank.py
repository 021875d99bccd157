"""The bank of generators at a model's root: what it feeds, and the weights that it makes ahead."""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from csg_seg.errors import CSGError
from csg_seg.fitting import fit_generator
from csg_seg.generators.linear import Generator
from csg_seg.generators.products import is_recorded
from csg_seg.generators.signature import check_signature

from .conv import CSGConv, batches, check_finite, check_fitted, draw_code, generate_weights, generated_convs, versions
from .loading import Reset, prepare
from .root import BANK, enroot, uproot
from .watch import WATCH


class Kept(NamedTuple):
    """Weights from one evaluation to the next: what they were made of, they, and torch's counts of writes to them."""

    inputs: list[Tensor]
    weights: list[Tensor]
    versions: list[int]


class GeneratorBank(nn.ModuleList):
    """The generators of a model, a child of its root that is not counted: see :mod:`csg_seg.root`.

    Attributes:
        left_dense: why a conv stayed dense, a :class:`csg_seg.retrofitting.selection.Reason` by name.
        layers: name and conv of each generated layer, as :meth:`refresh` found them; the bank does not register them.
        before_init: called with the bank when a trainer initialises the network.
        after_fit: called with the bank once weights are fitted.
        fitted: the relative error of each layer's weight at the last fit, by name.
        keep_generators: whether the generators are another network's, which a fit keeps.
        kept: by generator, the weights of the last evaluation.
        reset: which layers may start anew when weights are loaded.
        fit_on_load: whether dense weights that are loaded are fitted, or dropped because a
            training checkpoint follows.
    """

    def __init__(self, generators: Iterable[Generator], left_dense: Mapping[str, object]):
        super().__init__(generators)
        self.left_dense = dict(left_dense)
        self.layers: dict[str, CSGConv] = {}
        self.before_init: Callable[[GeneratorBank], None] | None = None
        self.after_fit: Callable[[GeneratorBank], None] | None = None
        self.fitted: dict[str, float] = {}
        self.keep_generators = False
        self.kept: dict[int, Kept] = {}
        self.reset = Reset()
        self.fit_on_load = True
        self._changes = CSGConv.changes
        self._is_watched = False

    def forward(self, input: Any) -> Any:
        """Return the input: a root whose forward runs all that is registered in turn runs the bank too."""
        return input

    def __iter__(self) -> Iterator[Generator]:
        return cast(Iterator[Generator], super().__iter__())

    def __getstate__(self) -> dict[str, Any]:
        """Leave out of copies and pickles what can be made again."""
        return {**self.__dict__, 'kept': {}, '_is_watched': False}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Watch the layers of a copy as those of any new network."""
        super().__setstate__(state)
        WATCH.begin(self.layers)

    def refresh(self, root: nn.Module) -> None:
        """Look up which layers the generators feed by now: some may have been added, copied, renamed or dropped.

        A copy of a layer brings a copy of its generator, and shares the network's own again as long as the two are
        the same.

        Raises:
            CSGError: a layer's generator is none of the bank's.
        """
        self._changes = CSGConv.changes
        fed = dict(generated_convs(root))
        for name, conv in fed.items():
            if all(conv.generator is not generator for generator in self):
                self._adopt(name, conv)
        self.layers = fed
        for generator in self:
            generator.layers = {
                name: tuple(conv.weight_shape) for name, conv in fed.items() if conv.generator is generator
            }

    def _adopt(self, name: str, conv: CSGConv) -> None:
        """Let a copied layer share a generator of the bank's that is the same as its own."""
        for generator in self:
            if _same_generators(generator, conv.generator):
                object.__setattr__(conv, 'generator', generator)
                return
        raise CSGError(
            f"{name}: its generator is not this network's: the layer was taken from another network, or copied "
            'before training went on; copy a layer of the network as it is now, or materialise both'
        )

    def share_with(self, root: nn.Module) -> None:
        """Give the generators to a second root too, such as a slice of a container."""
        bank = GeneratorBank(self, {})
        bank.keep_generators = True  # a fit of the part must not change the rest
        attach_bank(root, bank)

    def begin_pass(self, root: nn.Module) -> None:
        """See, before a forward pass of the root, that layers are known, and that the first training is watched."""
        self.reset.is_on = False
        begins = not self._is_watched and torch.is_grad_enabled()
        if begins or self._changes != CSGConv.changes:
            self.refresh(root)
        if begins:
            WATCH.begin(self.layers, root)
            self._is_watched = True
        elif WATCH.is_over:
            WATCH.end()

    def make_ahead(self) -> None:
        """Make the weights of all layers, small ones at once, for the forward pass of the root that begins.

        Without gradients they are kept from pass to pass, as long as all that they are made of has the same
        values. A layer that is called elsewhere, compiled or recomputed makes its weight itself, and so does one
        whose code or generator was written to since the pass began.
        """
        for position, generator in enumerate(self):
            if not all(type(each) is nn.Parameter for each in generator.parameters()):
                continue
            convs = [conv for conv in self.layers.values() if conv.generator is generator and conv.can_be_made_ahead()]
            if torch.is_grad_enabled():
                self.kept.pop(position, None)
                weights = _make_small(convs) if generator.is_product else {}
            else:
                weights = self._keep(position, convs) if convs else {}
            for conv, weight in weights.items():
                conv.make_ready(weight)

    def drop_ahead(self) -> None:
        """Let each layer make its weight itself again."""
        for conv in self.layers.values():
            conv.__dict__.pop('ready', None)

    def _keep(self, position: int, convs: Sequence[CSGConv]) -> dict[CSGConv, Tensor]:
        """Return the weights of one generator's convs, those of the last time if nothing has changed since."""
        generator = convs[0].generator
        inputs = [torch.cat([conv.code for conv in convs]), *generator.parameters(), *generator.buffers()]
        if generator.settings.residual:
            inputs += [each for conv in convs for each in (conv.residual_out, conv.residual_in)]
        # By their values: writes to .data, as those of an EMA, leave no other trace.
        kept = self.kept.get(position)
        if kept is None or kept.versions != versions(kept.weights) or not all(map(_same, kept.inputs, inputs)):
            # A cropped weight is a view, which every conv would copy.
            weights = [weight.contiguous() for weight in generate_weights(convs)]
            kept = self.kept[position] = Kept([each.clone() for each in inputs], weights, versions(weights))
        return dict(zip(convs, kept.weights, strict=True))

    def train(self, mode: bool = True) -> Any:
        """Set the mode; training lets kept weights go."""
        if mode:
            self.kept.clear()
        return super().train(mode)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Move or cast the generators; weights that are kept stay where they were and are let go."""
        self.kept.clear()
        return super()._apply(fn, recurse)

    def begin_init(self) -> None:
        """Prepare for a trainer that initialises the network, and may load weights into it or its parts."""
        self.reset.is_on = self.fit_on_load
        if self.before_init is not None and self.fit_on_load:
            self.before_init(self)

    def init_weights(self) -> None:
        """Fit what was loaded into parts of the network; called last, after all else is initialised."""
        self.fit_loaded()

    @torch.no_grad()
    def load_generators(self, weights: Mapping[str, Tensor]) -> None:
        """See :func:`csg_seg.load_generators`."""
        stored = {name.removeprefix(f'{BANK}.'): each for name, each in weights.items() if name.startswith(f'{BANK}.')}
        own = self.state_dict()
        if not stored:
            raise CSGError('there is no generator in these weights; give those of a CSG network')
        count = len({name.split('.')[0] for name in stored})
        if count != len(self):
            raise CSGError(f'the weights hold {count} generators, this network has {len(self)}')
        self.check_signatures(stored)
        for name, tensor in own.items():
            other = stored.get(name)
            if other is None:
                raise CSGError(f'the weights lack {BANK}.{name}; take those of a whole CSG network')
            if other.shape != tensor.shape and not name.endswith('_extra_state'):
                raise CSGError(f'{BANK}.{name} is {tuple(other.shape)} there and {tuple(tensor.shape)} here')
            if other.is_floating_point():
                check_finite(f'{BANK}.{name}', other)
        stored = {name: stored[name] for name in own}
        self.load_state_dict(stored)
        self.keep_generators = True
        self.draw_codes(self.layers)

    @torch.no_grad()
    def draw_codes(self, names: Collection[str]) -> None:
        """Draw codes of some layers anew, at the Kaiming variance that the generators as they are now give."""
        for generator in self:
            rng = torch.Generator().manual_seed(generator.settings.seed)
            for name, conv in self.layers.items():
                if name in names and conv.generator is generator:
                    conv.code.copy_(draw_code(conv, rng))

    def check_signatures(self, state_dict: Mapping[str, Tensor], prefix: str = '') -> None:
        """Refuse generators that were made with settings of another meaning.

        Args:
            state_dict: holds the bank's entries, with the prefix before their names.

        Raises:
            CSGError: says which setting differs.
        """
        for position, generator in enumerate(self):
            state = state_dict.get(f'{prefix}{position}._extra_state')
            if state is not None:
                check_signature(generator.settings, state)

    def forget_loaded(self) -> None:
        """Drop dense weights that were loaded and not fitted."""
        for conv in self.layers.values():
            conv.loaded = None

    def fit_loaded(self) -> dict[str, float]:
        """Fit generators and codes to the dense weights that were loaded, in place.

        Layers without one get new codes if their generator changes.

        Returns:
            the relative error of each fitted layer's weight, by name.
        """
        if not self.fit_on_load:
            self.forget_loaded()
        waiting = {name: conv.loaded for name, conv in self.layers.items() if conv.loaded is not None}
        # First, so that none is left behind where a fit fails.
        self.forget_loaded()
        errors: dict[str, float] = {}
        for generator in self:
            fed = {name: conv for name, conv in self.layers.items() if conv.generator is generator}
            loaded = {name: waiting[name] for name in fed if name in waiting}
            if loaded:
                errors |= _fit(generator, fed, loaded, keep=self.keep_generators or generator.settings.freeze_generator)
        self.fitted = errors
        if errors and self.after_fit is not None:
            self.after_fit(self)
        return errors


def find_bank(model: nn.Module) -> GeneratorBank | None:
    """Return the bank of a retrofitted root, None for any other module."""
    bank = model._modules.get(BANK)
    return bank if isinstance(bank, GeneratorBank) else None


def attach_bank(root: nn.Module, bank: GeneratorBank) -> None:
    """Register the bank on the root, and make loading into the root strict about it."""
    enroot(root, bank)
    bank.refresh(root)
    root.register_state_dict_pre_hook(refresh_before_save)
    root._register_load_state_dict_pre_hook(check_before_load, with_module=True)
    root.register_load_state_dict_post_hook(fit_after_load)
    root.register_forward_pre_hook(make_ahead)
    root.register_forward_hook(drop_ahead, always_call=True)
    WATCH.begin(bank.layers, root)


def find_roots(model: nn.Module) -> Iterator[tuple[str, nn.Module, GeneratorBank]]:
    """Yield each retrofitted root in a model, itself included: the prefix of its names, itself, its bank."""
    for name, module in model.named_modules():
        bank = find_bank(module)
        if bank is not None:
            bank.refresh(module)
            yield f'{name}.' if name else '', module, bank


def detach_bank(root: nn.Module) -> None:
    """Undo :func:`attach_bank`."""
    uproot(root)
    for hooks, ours in (
        (root._state_dict_pre_hooks, refresh_before_save),
        (root._load_state_dict_pre_hooks, check_before_load),
        (root._load_state_dict_post_hooks, fit_after_load),
        (root._forward_pre_hooks, make_ahead),
        (root._forward_hooks, drop_ahead),
    ):
        for key in [key for key, hook in hooks.items() if getattr(hook, 'hook', hook) is ours]:
            del hooks[key]
            root._forward_hooks_always_called.pop(key, None)


def bank_of(root: nn.Module) -> GeneratorBank:
    """Return the bank of a module that is known to be a retrofitted root."""
    return cast(GeneratorBank, root._modules[BANK])


def make_ahead(root: nn.Module, inputs: Any) -> None:
    """Begin a forward pass of the root; compiled, each layer makes its weight in the one graph."""
    if not is_recorded():
        bank = bank_of(root)
        bank.begin_pass(root)
        bank.make_ahead()


def drop_ahead(root: nn.Module, inputs: Any, outputs: Any) -> None:
    """End a forward pass of the root."""
    if not is_recorded():
        bank_of(root).drop_ahead()


def refresh_before_save(root: nn.Module, prefix: str, keep_vars: bool) -> None:
    """See that a state dict will hold what all layers need.

    Raises:
        CSGError: a dense weight was loaded into a part of the network and not fitted.
    """
    bank = bank_of(root)
    bank.refresh(root)
    check_fitted(bank.layers.values())


def check_before_load(root: nn.Module, state_dict: dict[str, Tensor], prefix: str, *_: object) -> None:
    """Refuse, before anything is copied, a state dict that does not fit the generated layers."""
    bank = bank_of(root)
    bank.refresh(root)
    bank.forget_loaded()
    bank.drop_ahead()  # of a pass that was interrupted
    prepare(root, bank, state_dict, prefix)


def fit_after_load(root: nn.Module, incompatible_keys: Any) -> None:
    """Fit what a dense state dict has just brought into the root, and draw the codes of layers that start anew."""
    bank = bank_of(root)
    bank.fit_loaded()
    bank.draw_codes(bank.reset.layers)


def _make_small(convs: Iterable[CSGConv]) -> dict[CSGConv, Tensor]:
    """Return the weights of small layers that learn, made together.

    A large layer makes its own when its turn comes, with less memory to go through.
    """
    learning = [conv for conv in convs if conv.code.requires_grad or conv.generator.weight.requires_grad]
    weights: dict[CSGConv, Tensor] = {}
    for batch in batches(learning):
        if len(batch) > 1:
            weights.update(zip(batch, generate_weights(batch), strict=True))
    return weights


def _same_generators(one: Generator, other: Generator) -> bool:
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


def _same(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and one.device == other.device and torch.equal(one, other)


def _fit(
    generator: Generator, fed: Mapping[str, CSGConv], loaded: Mapping[str, Tensor], *, keep: bool
) -> dict[str, float]:
    """Fit one generator, unless it is kept, and the convs it feeds to dense weights of some of them."""
    codes = dict(zip(loaded, fit_generator(generator, list(loaded.values()), keep=keep), strict=True))
    rng = torch.Generator().manual_seed(generator.settings.seed)
    errors = {}
    for name, conv in fed.items():
        if name not in loaded and keep:
            continue
        code = codes[name] if name in codes else draw_code(conv, rng)
        with torch.no_grad():
            conv.code.copy_(code)
            if name in loaded:
                dense = loaded[name].to(conv.code)
                _fit_residual(conv, dense)
                norm = dense.norm().item()
                errors[name] = (conv.generate_weight() - dense).norm().item() / norm if norm else 0.0
    return errors


def _fit_residual(conv: CSGConv, dense: Tensor) -> None:
    """Set a conv's residual, if it has one, to the best of its rank: a truncated SVD of what the generator leaves."""
    rank = conv.generator.settings.residual
    if rank:
        conv.residual_out.zero_()
        left = (dense - conv.generate_weight()).flatten(1)
        out, scale, into = torch.linalg.svd(left, full_matrices=False)
        # Shared alike between the factors, so that both learn at one pace.
        conv.residual_out.copy_(out[:, :rank] * scale[:rank].sqrt())
        conv.residual_in.copy_(scale[:rank, None].sqrt() * into[:rank])
