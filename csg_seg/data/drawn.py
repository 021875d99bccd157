"""A drawn stand-in for Pascal VOC 2012: the same layout, classes and palette, made in seconds.

An object is a form (where it is solid) painted with a texture (how its two tones alternate) in a
hue. Backgrounds and unlabelled clutter use the same textures and hues, so that a class is known
by its form and texture together and not by colour.
"""

import json
import math
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
from numpy import ndarray
from PIL import Image

from csg_seg.errors import CSGError
from csg_seg.files import writing

# Raised whenever the same arguments would give other pixels.
VERSION = 1
IGNORE = 255
SPLITS = ('train', 'val')

# A field maps coordinates x (right) and y (down), about -1 to 1 over an object, to one number a
# point. A form's field is the depth inside its outline, negative outside; a texture's runs 0 to 1.
Field = Callable[[ndarray, ndarray], ndarray]


def _disc(cx: float, cy: float, rx: float, ry: float) -> Field:
    return lambda x, y: (1 - np.hypot((x - cx) / rx, (y - cy) / ry)) * min(rx, ry)


def _box(cx: float, cy: float, rx: float, ry: float) -> Field:
    return lambda x, y: np.minimum(rx - abs(x - cx), ry - abs(y - cy))


def _wedge(*corners: tuple[float, float]) -> Field:
    """A convex polygon; its corners run clockwise as seen."""
    sides = list(zip(corners, corners[1:] + corners[:1], strict=True))
    return lambda x, y: np.minimum.reduce([
        ((bx - ax) * (y - ay) - (by - ay) * (x - ax)) / math.hypot(bx - ax, by - ay)
        for (ax, ay), (bx, by) in sides
    ])  # fmt: skip


def _join(*forms: Field) -> Field:
    return lambda x, y: np.maximum.reduce([form(x, y) for form in forms])


def _pair(part: Callable[..., Field], apart: float, *rest: float) -> Field:
    return _join(part(-apart, *rest), part(apart, *rest))


def _wheels(apart: float, cy: float, radius: float, hole: float) -> Field:
    tyres, hubs = (_pair(_disc, apart, cy, r, r) for r in (radius, hole))
    return lambda x, y: np.minimum(tyres(x, y), -hubs(x, y))


def _crisp(wave: ndarray) -> ndarray:
    return np.clip(0.5 + 1.5 * wave, 0, 1)


def _bricks(x: ndarray, y: ndarray) -> ndarray:
    course = np.floor(3 * y)
    joint = np.maximum(abs((3 * y) % 1 - 0.5), abs((1.5 * x + course / 2) % 1 - 0.5))
    return _crisp(12 * (joint - 0.4))


TEXTURES: dict[str, Field] = {
    'plain': lambda x, y: np.full_like(x, 0.3),
    'level': lambda x, y: _crisp(np.sin(13 * y)),
    'upright': lambda x, y: _crisp(np.sin(13 * x)),
    'slanted': lambda x, y: _crisp(np.sin(9 * (x + y))),
    'checks': lambda x, y: _crisp(2 * np.sin(9 * x) * np.sin(9 * y)),
    'dots': lambda x, y: _crisp(np.cos(13 * x) + np.cos(13 * y) - 0.6),
    'patches': lambda x, y: _crisp(np.sin(5 * x + 2 * np.sin(4 * y)) + np.sin(6 * y)),
    'rings': lambda x, y: _crisp(np.sin(16 * np.hypot(x, y))),
    'zigzag': lambda x, y: _crisp(np.sin(14 * y + 4 * abs((2 * x) % 2 - 1))),
    'bricks': _bricks,
}

# Form, texture and hue (0 to 1 around the colour wheel) of each class, in VOC's order from id 1.
OBJECTS: dict[str, tuple[Field, str, float]] = {
    'aeroplane': (_join(_disc(0, 0, 1, 0.22), _wedge((-0.95, -0.4), (-0.6, 0), (-0.95, 0.4)),
        _wedge((0.35, 0), (-0.35, 0.95), (-0.6, 0.95), (-0.25, 0)),
        _wedge((0.35, 0), (-0.25, 0), (-0.6, -0.95), (-0.35, -0.95))), 'plain', 0.60),
    'bicycle': (_join(_wheels(0.55, 0.3, 0.5, 0.16),
        _wedge((-0.5, -0.6), (0.5, -0.6), (0.15, 0.4), (-0.15, 0.4))), 'slanted', 0.85),
    'bird': (_join(_disc(0, 0.15, 0.6, 0.42), _wedge((-1, 0.1), (-0.3, 0.1), (-0.3, 0.3), (-1, 0.5)),
        _disc(0.5, -0.1, 0.28, 0.28), _wedge((0.65, -0.2), (1, -0.05), (0.65, 0.05)),
        _wedge((-0.3, -0.9), (0.25, 0.1), (-0.25, 0.2), (-0.7, -0.7))), 'zigzag', 0.20),
    'boat': (_join(_wedge((-1, 0.35), (1, 0.35), (0.6, 0.85), (-0.6, 0.85)), _box(0, 0, 0.07, 0.6),
        _wedge((0, -0.95), (0.75, 0.25), (0, 0.25)), _wedge((-0.1, -0.7), (-0.1, 0.25), (-0.6, 0.25))), 'level', 0.50),
    'bottle': (_join(_box(0, 0.4, 0.45, 0.6), _disc(0, -0.2, 0.45, 0.35), _box(0, -0.7, 0.18, 0.3)), 'upright', 0.40),
    'bus': (_join(_box(0, -0.1, 0.95, 0.55), _pair(_disc, 0.5, 0.5, 0.22, 0.22)), 'checks', 0.00),
    'car': (_join(_box(0, 0.2, 1, 0.25), _wedge((-0.35, -0.4), (0.3, -0.4), (0.6, 0.1), (-0.65, 0.1)),
        _pair(_disc, 0.55, 0.45, 0.25, 0.25)), 'plain', 0.90),
    'cat': (_join(_disc(0, 0.15, 0.75, 0.65), _wedge((-0.7, -0.95), (-0.05, -0.4), (-0.7, 0.1)),
        _wedge((0.7, -0.95), (0.7, 0.1), (0.05, -0.4))), 'slanted', 0.15),
    'chair': (_join(_box(-0.5, -0.25, 0.25, 0.75), _box(0, 0.25, 0.75, 0.24),
        _pair(_box, 0.55, 0.65, 0.2, 0.35)), 'level', 0.30),
    'cow': (_join(_box(-0.1, 0, 0.7, 0.38), _pair(_box, 0.55, 0.6, 0.14, 0.4), _disc(0.75, -0.2, 0.3, 0.24),
        _pair(_box, 0.25, 0.6, 0.12, 0.4), _wedge((0.5, -0.75), (0.8, -0.3), (0.6, -0.3)),
        _wedge((1, -0.75), (0.95, -0.3), (0.75, -0.3))), 'patches', 0.25),
    'diningtable': (_join(_disc(0, -0.25, 1, 0.42), _box(0, 0.25, 0.2, 0.5),
        _disc(0, 0.75, 0.6, 0.2)), 'bricks', 0.10),
    'dog': (_join(_disc(0, -0.1, 0.55, 0.6), _pair(_disc, 0.65, 0.05, 0.22, 0.55),
        _disc(0, 0.45, 0.35, 0.4)), 'patches', 0.95),
    'horse': (_join(_disc(-0.15, 0.05, 0.65, 0.3), _wedge((-0.7, -0.15), (-0.7, 0.15), (-1, 0.6)),
        _pair(_box, 0.5, 0.6, 0.1, 0.4), _pair(_box, 0.3, 0.6, 0.1, 0.4),
        _wedge((0.3, -0.95), (0.65, -0.95), (0.45, 0.2), (0.1, 0.2)),
        _wedge((0.4, -0.95), (1, -0.7), (0.95, -0.45), (0.4, -0.65))), 'plain', 0.05),
    'motorbike': (_join(_wheels(0.6, 0.45, 0.42, 0.12), _box(0.55, -0.6, 0.25, 0.1),
        _wedge((-0.8, -0.3), (0.5, -0.5), (0.5, 0.3), (-0.5, 0.3))), 'checks', 0.70),
    'person': (_join(_disc(0, -0.7, 0.25, 0.28), _pair(_box, 0.2, 0.6, 0.14, 0.4),
        _wedge((-0.45, -0.4), (0.45, -0.4), (0.28, 0.3), (-0.28, 0.3)),
        _wedge((-0.45, -0.4), (-0.3, -0.2), (-0.7, 0.3), (-0.85, 0.2)),
        _wedge((0.45, -0.4), (0.85, 0.2), (0.7, 0.3), (0.3, -0.2))), 'upright', 0.75),
    'pottedplant': (_join(_wedge((-0.5, 0.3), (0.5, 0.3), (0.3, 0.95), (-0.3, 0.95)), _box(0, 0, 0.1, 0.4),
        _pair(_disc, 0.5, -0.2, 0.4, 0.3), _disc(0, -0.5, 0.3, 0.45)), 'dots', 0.45),
    'sheep': (_join(_pair(_disc, 0.22, 0.16, 0.33, 0.3), _pair(_disc, 0.22, -0.36, 0.33, 0.3),
        _pair(_disc, 0.45, -0.1, 0.33, 0.3), _disc(0.8, -0.2, 0.22, 0.3),
        _pair(_box, 0.3, 0.5, 0.11, 0.4)), 'rings', 0.35),
    'sofa': (_join(_box(0, -0.2, 0.75, 0.45), _box(0, 0.3, 0.9, 0.25),
        _pair(_disc, 0.8, 0.1, 0.22, 0.42)), 'zigzag', 0.80),
    'train': (_join(_wedge((-1, -0.35), (0.55, -0.35), (1, 0.3), (-1, 0.3)), _box(-0.7, -0.45, 0.3, 0.25),
        _box(0.25, -0.5, 0.13, 0.25), _pair(_disc, 0.6, 0.35, 0.2, 0.2), _disc(0, 0.35, 0.2, 0.2)), 'upright', 0.55),
    'tvmonitor': (_join(_box(0, -0.2, 0.85, 0.6), _box(0, 0.5, 0.13, 0.25), _box(0, 0.8, 0.5, 0.12)), 'rings', 0.65),
}  # fmt: skip


def draw_dataset(
    root: str | Path,
    *,
    train: int = 400,
    val: int = 100,
    size: int = 80,
    seed: int = 0,
    progress: Callable[[Iterable], Iterable] | None = None,
) -> Path:
    """Draw a data set in Pascal VOC 2012's layout, unless the same one is already there.

    Args:
        root: folder to write ``VOC2012`` into; made if it is absent.
        train, val: number of images in each split; from 20 on, a split shows every class.
        size: side of the square images, in pixels.
        seed: any number from 0; image ``i`` of a split depends on it, the split, ``i`` and size.
        progress: wraps the list of images while they are drawn, as ``rich.progress.track`` does.

    Returns:
        ``root/VOC2012``, mmseg's ``data_root`` for ``PascalVOCDataset``.

    Raises:
        CSGError: an argument is out of range, ``root`` cannot be made, or ``root/VOC2012`` holds
            something else.
    """
    if min(train, val) < 1 or size < 32 or seed < 0:
        raise CSGError(
            f'cannot draw train={train}, val={val}, size={size}, seed={seed}: '
            'train and val start at 1, size at 32 and seed at 0'
        )
    drawn = {'version': VERSION, 'train': train, 'val': val, 'size': size, 'seed': seed}
    home = Path(root) / 'VOC2012'
    if _is_there(home, drawn):
        return home
    jobs = [(split, i) for split, n in enumerate((train, val)) for i in range(n)]
    try:
        home.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CSGError(f'{home.parent} cannot be made ({error.strerror}); draw into another folder') from error
    # Renamed as the last step, so an interrupted run leaves no half data set.
    with writing(home), tempfile.TemporaryDirectory(prefix='.drawing-', dir=home.parent) as scratch:
        half = Path(scratch) / home.name
        _write_lists(half, train=train, val=val)
        for split, i in progress(jobs) if progress else jobs:
            image, labels = draw_image(np.random.default_rng([seed, split, i]), size, lead=i)
            _write_pair(half, _name(split, i), image, labels)
        (half / 'drawn.json').write_text(json.dumps(drawn) + '\n')
        half.rename(home)
    return home


def draw_image(rng: np.random.Generator, size: int, *, lead: int) -> tuple[ndarray, ndarray]:
    """Draw one scene: a background, clutter and two or three objects, each over those before.

    Args:
        size: side in pixels.
        lead: the last object, which nothing hides, is of class ``1 + lead % 20``.

    Returns:
        The image, ``(size, size, 3)`` uint8, and its labels, ``(size, size)`` uint8: 0 for
        background and clutter, 255 on the pixel around each object.
    """
    image = _background(rng, size)
    labels = np.zeros((size, size), np.uint8)
    objects = list(OBJECTS.values())
    classes = [*rng.integers(1, 1 + len(OBJECTS), rng.integers(1, 3)), 1 + lead % len(OBJECTS)]
    for label in [0] * rng.integers(3) + classes:
        form, texture, hue = objects[label - 1] if label else _clutter(rng)
        x, y, radius = _place(rng, size, small=not label)
        depth = radius * form(x, y)
        vivid = rng.uniform(0.2, 0.3)
        paint = _paint(rng, TEXTURES[texture](x, y), hue + rng.normal(0, 0.02), vivid)
        # A dark rim and a lit upper side set an object off from a background of its own hue.
        shade = (0.55 + 0.45 * np.clip(depth / 2, 0, 1)) * (1 - 0.2 * y)
        cover = np.clip(depth + 0.5, 0, 1)[..., None]
        image += cover * (paint * shade[..., None] - image)
        inside = depth > 0
        labels[_grow(inside) & ~inside] = IGNORE if label else 0
        labels[inside] = label
    return _light(rng, image), labels


def _place(rng: np.random.Generator, size: int, *, small: bool) -> tuple[ndarray, ndarray, float]:
    """An object's own coordinates over the image, and its radius in pixels."""
    radius = size * (rng.uniform(0.08, 0.18) if small else rng.uniform(0.25, 0.42))
    down, right = np.indices((size, size)) - rng.uniform(0.2, 0.8, (2, 1, 1)) * size
    angle = rng.uniform(-np.pi, np.pi) if small else rng.normal(0, 0.25)
    x = (np.cos(angle) * right + np.sin(angle) * down) / radius
    y = (np.cos(angle) * down - np.sin(angle) * right) / radius
    x, y = x * rng.choice([-1, 1]), y * rng.uniform(0.85, 1.2)
    return x.astype(np.float32), y.astype(np.float32), radius


def _clutter(rng: np.random.Generator) -> tuple[Field, str, float]:
    """What belongs to no class: a star-shaped blob in any texture and hue."""
    lobes, reach, phase = rng.integers(2, 7), rng.uniform(0.1, 0.4), rng.uniform(0, 6)

    def blob(x: ndarray, y: ndarray) -> ndarray:
        return 0.7 + reach * np.sin(lobes * np.arctan2(y, x) + phase) - np.hypot(x, y)

    return blob, rng.choice(list(TEXTURES)), rng.uniform()


def _background(rng: np.random.Generator, size: int) -> ndarray:
    """Cloud, a horizon or one of the textures, ``(size, size, 3)`` in 0 to 1."""
    cloud = _cloud(rng, size, cells=int(rng.integers(3, 8)))
    x, y, _ = _place(rng, size, small=False)
    kind = rng.integers(4)
    if kind == 0:
        tones = cloud
    elif kind == 1:
        tones = _crisp(4 * y) * 0.7 + 0.3 * cloud
    else:
        texture = TEXTURES[rng.choice(list(TEXTURES))]
        tones = texture(x * kind, y * kind) * 0.5 + 0.5 * cloud
    return _paint(rng, tones, hue=rng.uniform(), vivid=rng.uniform(0.03, 0.15)) * rng.uniform(0.7, 1)


def _cloud(rng: np.random.Generator, size: int, *, cells: int) -> ndarray:
    """Smooth noise in 0 to 1, a cell the size of one of its blots."""
    coarse = Image.fromarray(rng.uniform(size=(cells, cells)).astype(np.float32))
    return np.asarray(coarse.resize((size, size), Image.Resampling.BILINEAR))


def _paint(rng: np.random.Generator, tones: ndarray, hue: float, vivid: float) -> ndarray:
    """Mix two tones of about one hue: ``(h, w)`` in 0 to 1 to ``(h, w, 3)``."""
    light, dark = rng.uniform(0.6, 0.8), rng.uniform(0.25, 0.4)
    one = _colour(hue, vivid, light)
    other = _colour(hue + rng.normal(0, 0.03), vivid, dark)
    return one + tones[..., None] * (other - one)


def _colour(hue: float, vivid: float, lightness: float) -> ndarray:
    return lightness + vivid * np.cos(2 * np.pi * (hue - np.arange(3) / 3))


def _light(rng: np.random.Generator, image: ndarray) -> ndarray:
    """Light the scene from one side, add the camera's gain and noise, and round to bytes."""
    size = len(image)
    across, down = rng.uniform(-0.2, 0.2, 2)
    ramp = np.linspace(-1, 1, size)
    lamp = rng.uniform(0.8, 1.2) * (1 + across * ramp + down * ramp[:, None])
    noise = rng.normal(0, rng.uniform(0.01, 0.04), image.shape)
    return np.clip(255 * (image * lamp[..., None] + noise), 0, 255).astype(np.uint8)


def _grow(inside: ndarray) -> ndarray:
    """A mask and the pixels that touch it, corners included."""
    padded = np.pad(inside, 1)
    tall = padded[:-2] | padded[1:-1] | padded[2:]
    return tall[:, :-2] | tall[:, 1:-1] | tall[:, 2:]


def palette() -> list[int]:
    """VOC's 256 colours, red, green and blue in turn: a class id's bits dealt to the channels."""
    return [
        sum(((index >> (3 * bit + channel)) & 1) << (7 - bit) for bit in range(3))
        for index in range(256)
        for channel in range(3)
    ]


def _is_there(home: Path, drawn: dict[str, int]) -> bool:
    """Whether ``home`` holds this very data set; something else there is an error."""
    if not home.exists():
        return False
    record = home / 'drawn.json'
    try:
        found = json.loads(record.read_text())
    except (OSError, ValueError):
        raise CSGError(
            f'{home} is there, without a drawn.json that can be read; move it away or draw into another folder'
        ) from None
    if found != drawn:
        raise CSGError(f'{home} was drawn with {found}, not {drawn}; move it away or draw into another folder')
    images = len(list(home.glob('JPEGImages/*.jpg')))
    masks = len(list(home.glob('SegmentationClass/*.png')))
    if images != masks or images != drawn['train'] + drawn['val']:
        raise CSGError(
            f'{home} has lost files since it was drawn ({images} images, {masks} masks '
            f'of {drawn["train"] + drawn["val"]}); delete it and draw again'
        )
    return True


def _name(split: int, index: int) -> str:
    return f'{SPLITS[split]}_{index:05d}'


def _write_lists(home: Path, **counts: int) -> None:
    for folder in ('JPEGImages', 'SegmentationClass', 'ImageSets/Segmentation'):
        (home / folder).mkdir(parents=True)
    names = {s: [_name(i, k) for k in range(counts[s])] for i, s in enumerate(SPLITS)}
    names['trainval'] = names['train'] + names['val']
    for split, lines in names.items():
        target = home / 'ImageSets/Segmentation' / f'{split}.txt'
        target.write_text('\n'.join(lines) + '\n')


def _write_pair(home: Path, name: str, image: ndarray, labels: ndarray) -> None:
    Image.fromarray(image).save(home / 'JPEGImages' / f'{name}.jpg', quality=92)
    mask = Image.fromarray(labels)
    mask.putpalette(palette())
    mask.save(home / 'SegmentationClass' / f'{name}.png')
