"""Save figures of matplotlib."""

import os
from pathlib import Path

from matplotlib.figure import Figure

from csg_seg.errors import CSGError
from csg_seg.files import write_whole


def save_figure(figure: Figure, path: str | os.PathLike, *, dpi: int = 150) -> None:
    """Save a figure completely or not at all, and create its folder.

    Args:
        figure: the figure.
        path: the file to write; its ending selects the format.
        dpi: resolution in dots per inch.

    Raises:
        CSGError: the file cannot be written, or its ending is not a format.
    """
    path = Path(path)
    try:
        write_whole(path, lambda partial: figure.savefig(partial, dpi=dpi, format=path.suffix[1:]))
    except CSGError:
        raise
    except ValueError as error:
        raise CSGError(f'{path}: cannot be drawn ({error}); use a name that ends in .png') from None
