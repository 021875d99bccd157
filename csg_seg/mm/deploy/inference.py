"""A trained network from any of its files, and images as it takes them."""

import os
from argparse import ArgumentParser
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import cv2
import mmcv
import numpy as np
import torch
from matplotlib import colormaps
from mmengine.config import Config, DictAction
from mmengine.dataset import Compose, pseudo_collate
from mmengine.registry import DATASETS, TRANSFORMS, VISUALIZERS, init_default_scope
from mmengine.structures import BaseDataElement, PixelData
from mmseg.structures import SegDataSample
from torch import Tensor, nn

from csg_seg.errors import CSGError
from csg_seg.files import write_whole
from csg_seg.mm.checkpoints.reading import load_weights, read_checkpoint
from csg_seg.mm.model import build_model
from csg_seg.mm.running.configs import data_sets, read_config
from csg_seg.storage.compact import load_compact

TAB20 = colormaps['tab20']
# Pixels of the shorter side, below which a picture of a class's name is enlarged.
SMALLEST = 224
# What a pipeline does for the labels that an image of the user's does not have.
LABELS = ('LoadAnnotations', 'LoadPanopticAnnotations')


def add_network_options(parser: ArgumentParser) -> None:
    """Add ``config``, ``checkpoint`` and ``--cfg-options``, as :func:`load_network` takes them."""
    parser.add_argument('config', nargs='?', help='config file; not needed for a compact checkpoint')
    parser.add_argument('checkpoint', help='.pth or .safetensors')
    parser.add_argument('--cfg-options', nargs='+', action=DictAction, help='override settings: key=value ...')


def load_network(
    config: str | os.PathLike | None, checkpoint: str | os.PathLike, options: Mapping[str, Any] | None = None
) -> nn.Module:
    """Load a trained network for inference.

    Args:
        config: file; CSG for a checkpoint with codes, dense for a dense or materialised one; None for
            a compact checkpoint that says how its network is built.
        checkpoint: ``.pth`` of mmengine, or a compact ``.safetensors``.
        options: settings of the config to override.

    Returns:
        in evaluation mode, with ``cfg`` and ``dataset_meta`` as mmseg's and mmpretrain's functions want them.

    Raises:
        FileNotFoundError: there is no such file.
        CSGError: the file is damaged, is not the config's, or needs a config.
    """
    if config is not None:
        cfg = read_config(config, options)
        network = build_model(cfg)
        read = read_checkpoint(checkpoint)
        load_weights(network, read['state_dict'])
        network.cfg = cfg
    elif options or Path(checkpoint).suffix != '.safetensors':
        why = 'settings are those of a config' if options else 'only a compact checkpoint is enough by itself'
        raise CSGError(f'{checkpoint}: {why}; give its config too')
    else:
        network = load_compact(checkpoint)
        if not hasattr(network, 'test_step'):
            raise CSGError(
                f'{checkpoint}: a {type(network).__name__} of neither mmseg nor mmpretrain; load it with '
                'csg_seg.load_compact'
            )
        read = read_checkpoint(checkpoint)
    meta = read['meta'].get('dataset_meta') or {}
    if config is not None and not meta.get('classes'):
        meta = {**_named_by_data_set(network.cfg), **{key: each for key, each in meta.items() if each is not None}}
    network.dataset_meta = meta
    return network.eval()


def prepare(network: nn.Module, images: Sequence[str | os.PathLike | np.ndarray]) -> dict[str, Any]:
    """Make a batch of images by the network's test pipeline.

    Args:
        network: of :func:`load_network`.
        images: files, or arrays ``(height, width, 3)``, uint8, BGR.

    Returns:
        what its ``test_step`` takes.

    Raises:
        FileNotFoundError: there is no such image.
        CSGError: a file is no image, or the network's config has no test pipeline.
    """
    cfg = network.cfg
    init_default_scope(cfg.get('default_scope', 'mmseg'))
    steps = [each for each in cfg.get('test_pipeline') or [] if each['type'] not in LABELS]
    if not steps:
        raise CSGError('the config has no test_pipeline, which says how an image is prepared; add one')
    reads_files = _reads_files(network)
    loader = TRANSFORMS.build(steps[0] if reads_files else dict(type='LoadImageFromFile'))
    samples = [_array(each) if isinstance(each, np.ndarray) else _read(loader, each) for each in images]
    if not reads_files:
        samples = [{**sample, 'img': np.ascontiguousarray(sample['img'][..., ::-1])} for sample in samples]
    rest = Compose(steps[reads_files:])
    return pseudo_collate([rest(sample) for sample in samples])


@torch.no_grad()
def predict(network: nn.Module, image: str | os.PathLike | np.ndarray) -> BaseDataElement:
    """Predict the classes of an image, and their scores, as the network's library gives them."""
    return network.test_step(prepare(network, [image]))[0]


def draw(
    network: nn.Module, image: str | os.PathLike, prediction: BaseDataElement, *, opacity: float, scale: int = 1
) -> np.ndarray:
    """Draw a prediction upon its image.

    Args:
        network: whose ``dataset_meta`` names the classes, and gives their colours.
        image: file.
        prediction: of :func:`predict`.
        opacity: of the colours, above 0 and at most 1.
        scale: of the picture, so that names of classes can be read on a small image; at least 1.

    Returns:
        ``(scale * height, scale * width, 3)``, uint8, RGB.
    """
    picture = mmcv.imread(str(image), channel_order='rgb')
    height, width = picture.shape[:2]
    meta = _meta(network)
    if 'pred_label' in prediction:
        painter = VISUALIZERS.build(dict(type='mmpretrain.UniversalVisualizer', name='demo'))
        larger = max(float(scale), SMALLEST / min(height, width))  # for the text to be read
        return painter.visualize_cls(picture, prediction, classes=meta.get('classes'), rescale_factor=larger)
    painter = VISUALIZERS.build(dict(type='mmseg.SegLocalVisualizer', name='demo', alpha=opacity))
    count = _class_count(prediction)
    colours = meta.get('palette') or []
    if len(colours) != count:
        colours = (np.array([TAB20(index % 20)[:3] for index in range(count)]) * 255).astype(int).tolist()
    painter.dataset_meta = {'classes': _class_names(network, count), 'palette': colours}
    labels = _labels(prediction).repeat_interleave(scale, dim=1).repeat_interleave(scale, dim=2)
    picture = mmcv.imresize(picture, (scale * width, scale * height))
    painter.add_datasample('', picture, SegDataSample(pred_sem_seg=PixelData(data=labels)), draw_gt=False)
    return painter.get_image()


def save_picture(picture: np.ndarray, path: str | os.PathLike) -> None:
    """Save a picture of :func:`draw`, in the format that the path's ending names."""
    path = Path(path)
    _, encoded = cv2.imencode(path.suffix, mmcv.rgb2bgr(picture))
    write_whole(path, lambda partial: partial.write_bytes(encoded.tobytes()))


def name_classes(network: nn.Module, prediction: BaseDataElement, *, most: int = 5) -> dict[str, float]:
    """Name what a prediction found, by its share of the pixels or by the class's score, in percent, largest first."""
    if 'pred_label' in prediction:
        parts = prediction.pred_score
    else:
        labels = _labels(prediction)
        parts = torch.bincount(labels.flatten(), minlength=_class_count(prediction)) / labels.numel()
    names = _class_names(network, len(parts))
    largest = parts.argsort(descending=True).tolist()[:most]
    return {names[each]: round(100 * parts[each].item(), 2) for each in largest if parts[each] > 0}


def _named_by_data_set(cfg: Config) -> dict[str, Any]:
    """Return the classes, and their colours, of the data set that a config tests on, without reading any data."""
    init_default_scope(cfg.get('default_scope', 'mmseg'))
    loaders = [cfg.get(f'{split}_dataloader') or {} for split in ('test', 'val', 'train')]
    for dataset in (each for loader in loaders for each in data_sets(loader.get('dataset'))):
        kind = dataset.get('type')
        if isinstance(kind, str):
            with DATASETS.switch_scope_and_registry(None) as registry:
                kind = registry.get(kind)
        given = dataset.get('metainfo')
        known = {**(getattr(kind, 'METAINFO', None) or {}), **(given if isinstance(given, Mapping) else {})}
        if known.get('classes'):
            return {key: known[key] for key in ('classes', 'palette') if known.get(key)}
    return {}


def _meta(network: nn.Module) -> Mapping[str, Any]:
    return getattr(network, 'dataset_meta', None) or {}


def _labels(prediction: BaseDataElement) -> Tensor:
    """Return the class of each pixel, ``(1, height, width)``; a network of one score gives it as a float."""
    return prediction.pred_sem_seg.data.long()


def _class_count(prediction: BaseDataElement) -> int:
    """Return how many classes a segmentation tells apart: as many as scores, and two by one score's threshold."""
    return max(2, len(prediction.seg_logits.data))


def _class_names(network: nn.Module, count: int) -> list[str]:
    """Return the names of the classes, or their numbers where the names are those of other classes."""
    names = _meta(network).get('classes') or []
    return [*map(str, names if len(names) == count else range(count))]


def inputs(network: nn.Module, images: Sequence[str | os.PathLike | np.ndarray]) -> Tensor:
    """Return images as the network itself sees them: normalised, ``(batch, 3, height, width)``."""
    return network.data_preprocessor(prepare(network, images))['inputs']


def channel_order(network: nn.Module) -> str:
    """Say in which order, 'RGB' or 'BGR', the network itself takes the colours."""
    preprocessor = network.data_preprocessor
    swaps = getattr(preprocessor, '_channel_conversion', False) or getattr(preprocessor, 'to_rgb', False)
    return 'RGB' if _reads_files(network) == bool(swaps) else 'BGR'


def _reads_files(network: nn.Module) -> bool:
    """Tell pipelines that read files, as BGR, from those of CIFAR, which begin with RGB arrays."""
    steps = network.cfg.get('test_pipeline')
    return bool(steps) and steps[0]['type'] == 'LoadImageFromFile'


def _array(image: np.ndarray) -> dict[str, Any]:
    return dict(img=image, img_shape=image.shape[:2], ori_shape=image.shape[:2], img_path='')


def _read(loader: Any, path: str | os.PathLike) -> dict[str, Any]:
    if not Path(path).is_file():
        raise FileNotFoundError(f'{path}: no such image')
    try:
        return loader(dict(img_path=str(path)))
    except Exception as error:  # what decoders raise of a damaged file is theirs
        raise CSGError(f'{path}: no image ({type(error).__name__}); give a JPEG or PNG file') from None
