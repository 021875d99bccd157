"""The base and the updates of a table of trainings, written and tested."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from csg_seg.cli.console import progress_bar
from csg_seg.deploy.compact_export import compact
from csg_seg.errors import CSGError
from csg_seg.files import write_whole
from experiments.runs.runner import call_tool
from experiments.runs.table import Table
from experiments.runs.training import Run


def trained_family(table: Table, base: str, *, data: Path, work_dir: Path) -> tuple[Run, list[Run]]:
    """Return the run of a base and those of the cells that start from it.

    Args:
        table: of the trainings.
        base: label of the base's cell, such as ``csg-10x-s0``.
        data: folder that holds the data sets.
        work_dir: that of ``experiments.runs``.

    Raises:
        CSGError: there is no such cell, nothing starts from it, or one of them is not trained.
    """
    runs = {cell.label: Run(table, cell, data=data, work_dir=work_dir) for cell in table.cells}
    if base not in runs:
        raise CSGError(f'--base {base}: no cell of {table.path}; the cells are {", ".join(runs)}')
    variants = [run for run in runs.values() if base in run.cell.needs]
    if not variants:
        raise CSGError(f'--base {base}: no cell of {table.path} starts from it')
    for run in [runs[base], *variants]:
        run.trained()
    return runs[base], variants


def measure_updates(base: Run, variants: Sequence[Run], dtypes: Sequence[str], folder: Path) -> list[dict[str, Any]]:
    """Write the base as a compact file and each variant as an update of it, and test the files.

    Args:
        base: a trained cell.
        variants: trained cells that started from it.
        dtypes: precisions of the base, as for :func:`csg_seg.save_compact`.
        folder: gets the files.

    Returns:
        for each precision one row of the base and one of each variant: ``cell``, ``trains`` (patterns of the
        parameters that trained, None for all), ``dtype``, ``bytes``, ``dense_bytes``, ``test``, and ``val`` where its
        images are others.
    """
    rows = []
    files = [(dtype, run) for dtype in dtypes for run in (base, *variants)]
    for dtype, run in progress_bar('Testing')(files, total=len(files)):
        of_dtype = folder / dtype
        of_dtype.mkdir(exist_ok=True)
        out, whole = (of_dtype / f'{each.cell.label}.safetensors' for each in (run, base))
        settings = dict(dtype=dtype) if run is base else dict(base=whole)
        found = compact(run.cfg, run.trained(), out, **settings)
        scores = {split: _score(run, split, out) for split in run.splits}
        rows.append(
            {
                'cell': run.cell.name,
                'trains': run.cfg.model.get('train_only'),
                'dtype': dtype,
                'bytes': found['compact_bytes'],
                'dense_bytes': found['dense_bytes'],
                **scores,
            }
        )
    return rows


def _score(run: Run, split: str, file: Path) -> float:
    cfg = run.config_of(split)
    cfg.load_from = None  # names a cell
    config = file.with_name(f'{file.stem}-{split}.py')
    write_whole(config, lambda partial: partial.write_text(cfg.pretty_text))
    printed = call_tool('test.py', config, file, '--json', log=config.with_suffix('.txt'), threads=1)
    return json.loads(printed)[run.table.metric]
