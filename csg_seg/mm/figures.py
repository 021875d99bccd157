"""Pictures, written whole or not at all."""

import os
from pathlib import Path

from matplotlib.figure import Figure

from csg_seg.errors import CSGError
from csg_seg.files import write_whole


def save_figure(figure: Figure, path: str | os.PathLike, *, dpi: int = 150) -> None:
    """Save a picture, and make the folder it goes to.

    Raises:
        CSGError: the path cannot be written, or its ending names no format.
    """
    path = Path(path)
    try:
        write_whole(path, lambda partial: figure.savefig(partial, dpi=dpi, format=path.suffix[1:]))
    except CSGError:
        raise
    except ValueError as error:
        raise CSGError(f'{path}: cannot be drawn ({error}); give a name that ends in .png') from None
