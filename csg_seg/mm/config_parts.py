"""Find the data sets of a config inside their wrappers, its hooks, and the pipeline for inference."""

from collections.abc import Iterator, Mapping
from typing import Any

from mmengine.config import Config


def data_sets(dataset: Mapping[str, Any] | None) -> Iterator[Mapping[str, Any]]:
    """Yield the data set configs inside wrappers such as ConcatDataset and RepeatDataset."""
    if dataset is None:
        return
    inner = dataset.get('datasets') or dataset.get('dataset')
    if inner is None:
        yield dataset
    else:
        for each in inner if isinstance(inner, (list, tuple)) else [inner]:
            yield from data_sets(each)


def bare_type(part: Mapping[str, Any]) -> str:
    """Return the type of a part of a config, without the scope of its registry."""
    return str(part['type']).rpartition('.')[2]


def config_hooks(cfg: Config) -> list[Mapping[str, Any]]:
    """Return the hooks of a config, without those that are set to None."""
    hooks = [*(cfg.get('default_hooks') or {}).values(), *(cfg.get('custom_hooks') or [])]
    return [each for each in hooks if each]


def test_pipeline(cfg: Config) -> list[Mapping[str, Any]]:
    """Return the ``test_pipeline`` of a config, or that of its test data; empty if there is neither."""
    loader = cfg.get('test_dataloader') or {}
    given = [cfg.get('test_pipeline'), *(each.get('pipeline') for each in data_sets(loader.get('dataset')))]
    return list(next(filter(None, given), []))
