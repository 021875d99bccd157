"""Loading weights into a retrofitted root, and the fit of dense weights afterwards."""

import warnings
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from csg_seg.errors import CSGError, CSGWarning, abridge
from csg_seg.fitting import fit_generator
from csg_seg.generators.linear import Generator

from .conv import CSGConv, check_codes, check_finite, draw_code
from .root import BANK, Generators
from .state_dict_checks import Reset, check_entries, check_signatures, generator_entries
from .watch import WATCH

DRAWN = (
    'the generator was fitted to dense weights that lack those of {}: these layers were trained, and got new start '
    'values. Load the weights of all generated layers.'
)


@dataclass
class Loading:
    """Load weights into a bank's generators and layers.

    Attributes:
        bank: the generators and their layers.
        reset: which layers keep their start values if a checkpoint does not fit them.
        fit_on_load: whether loaded dense weights are fitted; if not, they are dropped, because a training checkpoint
            follows.
        keep_generators: whether a fit keeps the generators, because they belong to another network.
        built_with: dense weights from before the retrofit, by layer, which are fitted when a trainer initialises the
            network.
        errors: the relative error of each layer's weight at the last fit, by name.
        before_init: called with the bank when a trainer initialises the network.
        after_fit: called with the bank after a fit.
    """

    bank: Generators
    reset: Reset = field(default_factory=Reset)
    fit_on_load: bool = True
    keep_generators: bool = False
    built_with: dict[str, Tensor] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)
    before_init: Callable[[Any], None] | None = None
    after_fit: Callable[[Any], None] | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Leave out ``built_with``: no trainer initialises a copy, such as EMA's."""
        return {**self.__dict__, 'built_with': {}}

    def begin_init(self) -> None:
        """Prepare for a trainer that initialises the network, and may load weights into it or its parts."""
        self.reset.is_on = self.fit_on_load
        if self.before_init is not None and self.fit_on_load:
            self.before_init(self.bank)

    def end_init(self) -> None:
        """Let layers be fitted to the weights that they were built with, unless others were loaded."""
        for name, weight in self.built_with.items():
            conv = self.bank.layers.get(name)
            if conv is not None and conv.loaded is None:
                check_finite(f'{name}.weight', weight)
                conv.loaded = weight

    def forget_loaded(self) -> None:
        """Drop dense weights that were not fitted."""
        self.built_with.clear()
        for conv in self.bank.layers.values():
            conv.loaded = None

    def fit_loaded(self) -> dict[str, float]:
        """Fit generators and codes to the dense weights that were loaded, in place.

        A layer without such a weight gets new codes if its generator changes.

        Returns:
            The relative error of each fitted layer's weight, by name.
        """
        if not self.fit_on_load:
            self.forget_loaded()
        dense = {name: conv.loaded for name, conv in self.bank.layers.items() if conv.loaded is not None}
        if dense:
            self.bank.unshare()
        # Drop them first, so that none remains if the fit fails.
        self.forget_loaded()
        self.errors = {}
        for generator in self.bank:
            convs = {name: conv for name, conv in self.bank.layers.items() if conv.generator is generator}
            weights = {name: dense[name] for name in convs if name in dense}
            if weights:
                device = next(iter(convs.values())).code.device.type
                keep = self.keep_generators or generator.settings.freeze_generator
                drawn = {} if keep else {name: conv for name, conv in convs.items() if name not in weights}
                trained = [name for name, conv in drawn.items() if conv in WATCH.done and name not in self.reset.layers]
                if trained:  # seen from where model.load_state_dict is called
                    warnings.warn(DRAWN.format(abridge(trained)), CSGWarning, stacklevel=6)
                with torch.autocast(device, enabled=False):
                    self.errors |= _fit(generator, convs, weights, keep=keep)
        if self.errors and self.after_fit is not None:
            self.after_fit(self.bank)
        return self.errors

    @torch.no_grad()
    def load_generators(self, weights: Mapping[str, Tensor]) -> None:
        """See :func:`csg_seg.load_generators`."""
        count = len({name.split('.')[1] for name in weights if name.startswith(f'{BANK}.')})
        if not count:
            raise CSGError('there is no generator in these weights; give those of a CSG network')
        if count != len(self.bank):
            raise CSGError(f'the weights hold {count} generators, this network has {len(self.bank)}')
        check_signatures(self.bank, weights)
        for name, conv in self.bank.layers.items():
            check_codes(name, conv)
        self.bank.unshare()
        own = generator_entries(self.bank)
        check_entries(own, weights, 'take the weights of a whole CSG network')
        for name in own:
            check_finite(name, weights[name])
        self.bank.load_state_dict({name.removeprefix(f'{BANK}.'): weights[name] for name in own})
        self.keep_generators = True
        self.draw_codes(self.bank.layers)

    @torch.no_grad()
    def draw_codes(self, names: Collection[str]) -> None:
        """Draw new codes for some layers, at Kaiming variance with the current generators."""
        for generator in self.bank:
            rng = torch.Generator().manual_seed(generator.settings.seed)
            for name, conv in self.bank.layers.items():
                if name in names and conv.generator is generator:
                    conv.code.copy_(draw_code(conv, rng))


def _fit(
    generator: Generator, convs: Mapping[str, CSGConv], weights: Mapping[str, Tensor], *, keep: bool
) -> dict[str, float]:
    """Fit one generator, unless it is kept, and its convs to dense weights of some of them; return their errors."""
    codes = dict(zip(weights, fit_generator(generator, list(weights.values()), keep=keep), strict=True))
    rng = torch.Generator().manual_seed(generator.settings.seed)
    errors = {}
    for name, conv in convs.items():
        if name not in weights and keep:
            continue
        code = codes[name] if name in codes else draw_code(conv, rng)
        with torch.no_grad():
            conv.code.copy_(code)
            if name in weights:
                dense = weights[name].to(conv.code)
                _fit_residual(conv, dense)
                norm = dense.norm().item()
                errors[name] = (conv.generate_weight() - dense).norm().item() / norm if norm else 0.0
    return errors


def _fit_residual(conv: CSGConv, dense: Tensor) -> None:
    """Set a conv's residual, if it has one, to a truncated SVD of the error that the generator leaves."""
    rank = conv.generator.settings.residual
    if rank:
        conv.residual_out.zero_()
        left = (dense - conv.generate_weight()).flatten(1)
        out, scale, into = torch.linalg.svd(left, full_matrices=False)
        # Split evenly between the factors, so that both learn at the same pace.
        conv.residual_out.copy_(out[:, :rank] * scale[:rank].sqrt())
        conv.residual_in.copy_(scale[:rank, None].sqrt() * into[:rank])
