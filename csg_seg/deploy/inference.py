"""Load a trained network, predict images and draw the predictions."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import cv2
import mmcv
import numpy as np
import torch
from matplotlib import colormaps
from mmengine.config import Config
from mmengine.dataset import Compose, pseudo_collate
from mmengine.model import BaseModel
from mmengine.registry import DATASETS, TRANSFORMS, VISUALIZERS, init_default_scope
from mmengine.structures import BaseDataElement
from torch import Tensor

from csg_seg.errors import CSGError
from csg_seg.files import write_whole
from csg_seg.layers.bank import find_bank
from csg_seg.mm.checkpoints.reading import load_weights, read_checkpoint
from csg_seg.mm.config_parts import bare_type, data_sets, test_pipeline
from csg_seg.mm.model import build_model
from csg_seg.running.configs import read_config
from csg_seg.storage.compact import load_compact

TAB20 = colormaps['tab20']
FONT = cv2.FONT_HERSHEY_SIMPLEX
# Pictures with a class name are enlarged until the shorter side has this many pixels.
SMALLEST = 224
# Transforms that load labels, which the user's images do not have.
LABELS = ('LoadAnnotations', 'LoadPanopticAnnotations')


def load_network(
    config: str | os.PathLike | None,
    checkpoint: str | os.PathLike,
    options: Mapping[str, Any] | None = None,
    *,
    keep_weights: bool | None = None,
) -> BaseModel:
    """Load a trained network for inference.

    Args:
        config: a CSG config for a checkpoint with codes, a dense config for a dense or materialised
            checkpoint, or None for a compact checkpoint that contains its config.
        checkpoint: a training checkpoint (``.pth``) or a compact checkpoint (``.safetensors``).
        options: settings of the config to override, by dotted name.
        keep_weights: as for :func:`csg_seg.load_compact`; False saves memory. Dense networks ignore it.

    Returns:
        The network in evaluation mode, with the attributes ``cfg`` and ``dataset_meta`` that mmseg and
        mmpretrain expect.

    Raises:
        FileNotFoundError: there is no such file.
        CSGError: the file is damaged, does not fit the config, or needs a config.
    """
    if config is not None:
        cfg = read_config(config, options)
        network: BaseModel = build_model(cfg)
        read = read_checkpoint(checkpoint)
        load_weights(network, read['state_dict'])
        network.cfg = cfg
    elif Path(checkpoint).suffix == '.py':
        raise CSGError(f'{checkpoint}: a config; give its checkpoint too')
    elif options or Path(checkpoint).suffix != '.safetensors':
        why = 'options need a config' if options else 'only a compact checkpoint can be loaded alone'
        raise CSGError(f'{checkpoint}: {why}; give its config too')
    else:
        network = load_compact(checkpoint)
        if not hasattr(network, 'test_step'):
            raise CSGError(
                f'{checkpoint}: {type(network).__name__} is not a network of mmseg or mmpretrain; load it with '
                'csg_seg.load_compact'
            )
        read = read_checkpoint(checkpoint)
    meta = read['meta'].get('dataset_meta') or {}
    if config is not None and not meta.get('classes'):
        meta = _metainfo(network.cfg) | {key: each for key, each in meta.items() if each is not None}
    network.dataset_meta = meta
    bank = find_bank(network)
    if bank is not None and keep_weights is not None:
        bank.keep_weights = keep_weights
    return network.eval()


def prepare(network: BaseModel, images: Sequence[str | os.PathLike | np.ndarray]) -> dict[str, Any]:
    """Apply the network's test pipeline to images.

    Args:
        network: a network from :func:`load_network`.
        images: files, or uint8 BGR arrays ``(height, width, 3)``.

    Returns:
        The argument of the network's ``test_step``.

    Raises:
        FileNotFoundError: there is no such image.
        CSGError: a file is not an image, or the network's config has no test pipeline.
    """
    cfg = network.cfg
    init_default_scope(cfg.get('default_scope', 'mmseg'))
    steps = [each for each in test_pipeline(cfg) if bare_type(each) not in LABELS]
    if not steps:
        raise CSGError(
            'there is no test_pipeline, which prepares the images; add one to the config, and if a compact file '
            'contains the config, write that file again'
        )
    reads_files = _reads_files(network)
    loader = TRANSFORMS.build(steps[0] if reads_files else dict(type='LoadImageFromFile'))
    samples = [_array(each) if isinstance(each, np.ndarray) else _read(loader, each) for each in images]
    if not reads_files:
        samples = [{**sample, 'img': np.ascontiguousarray(sample['img'][..., ::-1])} for sample in samples]
    rest = Compose(steps[reads_files:])
    return pseudo_collate([rest(sample) for sample in samples])


@torch.no_grad()
def predict(network: BaseModel, image: str | os.PathLike | np.ndarray) -> BaseDataElement:
    """Predict the classes of an image and their scores, in the format of the network's library."""
    return network.test_step(prepare(network, [image]))[0]


def draw(
    network: BaseModel, image: str | os.PathLike, prediction: BaseDataElement, *, opacity: float, scale: int = 1
) -> np.ndarray:
    """Draw a prediction on its image.

    Args:
        network: the network; its ``dataset_meta`` has the names and colours of the classes.
        image: the image file.
        prediction: the result of :func:`predict`.
        opacity: opacity of the colours, above 0 and at most 1.
        scale: factor to enlarge the picture by, at least 1, which makes class names on small images readable.

    Returns:
        A uint8 RGB picture ``(scale * height, scale * width, 3)``; a classifier's may be larger.
    """
    picture = mmcv.imread(str(image), channel_order='rgb')
    height, width = picture.shape[:2]
    meta = _meta(network)
    if 'pred_label' in prediction:
        painter = VISUALIZERS.build(dict(type='mmpretrain.UniversalVisualizer', name='demo'))
        larger = max(float(scale), SMALLEST / min(height, width))  # makes the text readable
        return painter.visualize_cls(picture, prediction, classes=meta.get('classes'), rescale_factor=larger)
    count = _class_count(prediction)
    colours = meta.get('palette') or []
    if len(colours) != count:
        colours = [[255 * part for part in TAB20(index % 20)[:3]] for index in range(count)]
    labels = _labels(prediction)[0].cpu().numpy().repeat(scale, axis=0).repeat(scale, axis=1)
    picture = mmcv.imresize(picture, (scale * width, scale * height))
    picture = cv2.addWeighted(picture, 1 - opacity, np.array(colours, np.uint8)[labels], opacity, 0)
    names = _class_names(network, count)
    for each in np.unique(labels):
        _write_name(picture, names[each], labels == each)
    return picture


def _write_name(picture: np.ndarray, name: str, region: np.ndarray) -> None:
    """Write a name into a picture where the region, a mask, is widest, or as near as the edges allow."""
    height, width = region.shape
    distances = cv2.distanceTransform(np.pad(region.astype(np.uint8), 1), cv2.DIST_L2, cv2.DIST_MASK_3)[1:-1, 1:-1]
    widest = np.argwhere(distances == distances.max())
    y, x = widest[np.square(widest - widest.mean(axis=0)).sum(axis=1).argmin()]  # the middle one
    size = min(height, width) / 500
    thickness = max(1, round(size))
    full_width = cv2.getTextSize(name, FONT, size, thickness)[0][0]
    size *= min(1, 0.95 * width / max(1, full_width))
    (text_width, text_height), below = cv2.getTextSize(name, FONT, size, thickness)
    left = max(thickness, min(int(x) - text_width // 2, width - text_width - 3 * thickness))
    bottom = max(text_height, min(int(y) + text_height // 2, height - below))
    for right, down, grey in ((-1, -1, 0), (-1, 1, 0), (1, -1, 0), (1, 1, 0), (0, 0, 255)):  # an outline, the letters
        at = left + thickness * right, bottom + thickness * down
        cv2.putText(picture, name, at, FONT, size, (grey, grey, grey), thickness, cv2.LINE_AA)


def save_picture(picture: np.ndarray, path: str | os.PathLike) -> None:
    """Save a picture from :func:`draw`; the ending of the path selects the format."""
    path = Path(path)
    _, encoded = cv2.imencode(path.suffix, mmcv.rgb2bgr(picture))
    write_whole(path, lambda partial: partial.write_bytes(encoded.tobytes()))


def name_classes(network: BaseModel, prediction: BaseDataElement, *, most: int = 5) -> dict[str, float]:
    """Return the largest shares of the pixels, or the best scores of a classifier, in percent by class name."""
    if 'pred_label' in prediction:
        parts = prediction.pred_score
    else:
        labels = _labels(prediction)
        parts = torch.bincount(labels.flatten(), minlength=_class_count(prediction)) / labels.numel()
    names = _class_names(network, len(parts))
    largest = parts.argsort(descending=True).tolist()[:most]
    return {names[each]: round(100 * parts[each].item(), 2) for each in largest if parts[each] > 0}


def _metainfo(cfg: Config) -> dict[str, Any]:
    """Return the classes of a config's data set and their colours, without reading data."""
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


def _meta(network: BaseModel) -> Mapping[str, Any]:
    return getattr(network, 'dataset_meta', None) or {}


def _labels(prediction: BaseDataElement) -> Tensor:
    """Return the class of each pixel, ``(1, height, width)``; networks with one score predict it as a float."""
    return prediction.pred_sem_seg.data.long()


def _class_count(prediction: BaseDataElement) -> int:
    """Return the number of classes: the number of scores, or two for one score and a threshold."""
    return max(2, len(prediction.seg_logits.data))


def _class_names(network: BaseModel, count: int) -> list[str]:
    """Return the names of the classes, or their numbers if there are no names for this number of classes."""
    names = _meta(network).get('classes') or []
    return [*map(str, names if len(names) == count else range(count))]


def inputs(network: BaseModel, images: Sequence[str | os.PathLike | np.ndarray]) -> Tensor:
    """Return the input of the network for images: normalised, ``(batch, 3, height, width)``."""
    return network.data_preprocessor(prepare(network, images))['inputs']


def channel_order(network: BaseModel) -> str:
    """Return the order of the network's input channels, 'RGB' or 'BGR'."""
    preprocessor = network.data_preprocessor
    swaps = getattr(preprocessor, '_channel_conversion', False) or getattr(preprocessor, 'to_rgb', False)
    return 'RGB' if _reads_files(network) == bool(swaps) else 'BGR'


def _reads_files(network: BaseModel) -> bool:
    """Return whether the test pipeline reads files, as BGR; pipelines for CIFAR start from RGB arrays."""
    steps = test_pipeline(network.cfg)
    return bool(steps) and bare_type(steps[0]) == 'LoadImageFromFile'


def _array(image: np.ndarray) -> dict[str, Any]:
    return dict(img=image, img_shape=image.shape[:2], ori_shape=image.shape[:2], img_path='')


def _read(loader: Any, path: str | os.PathLike) -> dict[str, Any]:
    if not Path(path).is_file():
        raise FileNotFoundError(f'{path}: {"a folder, not an image" if Path(path).is_dir() else "no such image"}')
    try:
        return loader(dict(img_path=str(path)))
    except Exception as error:  # decoding a damaged file may raise anything
        raise CSGError(f'{path}: not an image ({type(error).__name__}); give a JPEG or PNG file') from None
