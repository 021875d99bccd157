"""The results of configs in the metafiles beside them, from the trainings in results/."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from csg_seg.generators.settings import Settings
from csg_seg.retrofitting.automatic import is_automatic
from csg_seg.running.configs import read_config

from .runs.rows import read_rows, summarise
from .runs.table import ROOT, Cell, read_table

TABLES = (
    'runs/tables/camvid.yml',
    'runs/tables/camvid_large.yml',
    'runs/tables/camvid_90x120_imagenet.yml',
    'runs/tables/kvasir.yml',
    'runs/tables/cifar10.yml',
    'rivals/tables/camvid_90x120.yml',
    'rivals/tables/kvasir_96.yml',
)
DATASETS = {
    'camvid': ('Semantic Segmentation', 'CamVid'),
    'camvid-90x120': ('Semantic Segmentation', 'CamVid'),
    'kvasir': ('Semantic Segmentation', 'Kvasir-SEG'),
    'kvasir-96x96': ('Semantic Segmentation', 'Kvasir-SEG'),
    'cifar10': ('Image Classification', 'CIFAR-10'),
}
METRICS = {'mIoU': 'mIoU', 'accuracy/top1': 'Top 1 Accuracy'}


def metafiles() -> dict[Path, str]:
    """Return all metafiles."""
    return {path: path.read_text() for path in sorted(ROOT.glob('configs/*/metafile.yml'))}


def fill_results(text: str, results: Mapping[str, list[dict[str, Any]]]) -> str:
    """Return a metafile in which exactly the given models have results.

    Args:
        text: of the metafile.
        results: by the model's name.
    """
    content = yaml.safe_load(text)
    for model in content['Models']:
        model.pop('Results', None)
        if model['Name'] in results:
            model['Results'] = results[model['Name']]
    return yaml.safe_dump(content, sort_keys=False, width=200)


def measured_results() -> dict[str, list[dict[str, Any]]]:
    """Return the mean test score of each config that a table of trainings has trained as it is, by its name."""
    results = {}
    for name in TABLES:
        table = read_table(ROOT / 'experiments' / name)
        scores = {each['cell']: each for each in summarise(read_rows(ROOT / 'results' / f'{table.dataset}.json'))}
        for cell in table.cells:
            if cell.name in scores and cell.csg is not None and not cell.options and cell.epochs is None:
                each, (task, dataset) = scores[cell.name], DATASETS[table.dataset]
                metrics = {METRICS[table.metric]: round(each['test'][0], 2)}
                for config in _configs_of(cell):
                    results[config] = [{'Task': task, 'Dataset': dataset, 'Metrics': metrics}]
    return results


def _configs_of(cell: Cell) -> list[str]:
    """Return the names of the CSG configs, beside the cell's dense config, with the cell's settings."""
    dense = ROOT / cell.config
    paths = dense.parent.glob(f'csg-*_{dense.name}')
    return [path.stem for path in paths if _settings(read_config(path).model.csg) == _settings(cell.csg)]


def _settings(csg: Any) -> list[Any]:
    if is_automatic(csg):
        return [csg if csg == 'auto' else dict(csg)]
    several = csg if isinstance(csg, list) else [csg]
    return [Settings.from_dict(each, position=position).to_dict() for position, each in enumerate(several)]
