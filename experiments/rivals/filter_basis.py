"""A generator of parts of filters: ``csg=dict(generator='filter_basis', slice_shape=(1, 128, 3, 3), code_dim=70)``."""

from csg_seg import register_generator
from csg_seg.errors import CSGError
from csg_seg.generators.linear import Generator
from csg_seg.generators.settings import Settings


@register_generator('filter_basis')
class FilterBasisGenerator(Generator):
    """Parts of filters as combinations of a learned basis: ``part = code @ weight``.

    Li et al., "Learning Filter Basis for Convolutional Neural Network Compression", ICCV 2019. A filter is split along
    the input channels into parts of ``s_in`` channels, the paper's basis size. Each part is a combination of
    ``code_dim`` basis filters, the same for all parts. The layer is then a conv with the basis, for each part of the
    input, and a 1x1 conv with the coefficients; here the product of the two is the layer's weight.

    Differences from the paper: there, each layer has a basis, or in residual networks each stage, and both convs may
    have a bias. Here all layers of a ``csg`` dict share a basis, so a list of dicts with ``include`` gives each stage
    its own. Basis and coefficients start as in a linear generator instead of at Kaiming variance each.

    Attributes:
        weight: ``(code_dim, s_in * kh * kw)``, the basis.
    """

    @classmethod
    def check_settings(cls, settings: Settings) -> None:
        """Require slices of one filter."""
        s_out, *part = settings.slice_shape
        if s_out != 1:
            wanted = (1, *part)
            raise CSGError(
                f'a slice of filter_basis is a part of one filter, such as slice_shape={wanted}; got {s_out}'
            )
