"""A drawn substitute for Pascal VOC 2012: the same layout, classes and palette, made in seconds.

An object has a form (its outline), a texture (how its two tones alternate) and a hue. Backgrounds and unlabelled
clutter use the same textures and hues, so a class can be recognised only by form and texture together.
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

# Increased whenever the same arguments would give other pixels.
VERSION = 1
IGNORE = 255
SPLITS = ('train', 'val')

# A field maps coordinates x (right) and y (down), about -1 to 1 over an object, to one number per point: the depth
# inside the outline for a form, negative outside, and a tone from 0 to 1 for a texture.
Field = Callable[[ndarray, ndarray], ndarray]


def _disc(cx: float, cy: float, rx: float, ry: float) -> Field:
    return lambda x, y: (1 - np.hypot((x - cx) / rx, (y - cy) / ry)) * min(rx, ry)


def _box(cx: float, cy: float, rx: float, ry: float) -> Field:
    return lambda x, y: np.minimum(rx - abs(x - cx), ry - abs(y - cy))


def _wedge(*corners: tuple[float, float]) -> Field:
    """A convex polygon with its corners in clockwise order."""
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
    """Draw a data set in Pascal VOC 2012's layout, unless the same one already exists.

    Args:
        root: folder to write ``VOC2012`` into; created if it does not exist.
        train, val: number of images in each split; with 20 or more, a split shows every class.
        size: side of the square images, in pixels.
        seed: at least 0; image ``i`` of a split depends on the seed, the split, ``i`` and the size.
        progress: wraps the list of images to show progress, as ``rich.progress.track`` does.

    Returns:
        ``root/VOC2012``, mmseg's ``data_root`` for ``PascalVOCDataset``.

    Raises:
        CSGError: an argument is out of range, ``root`` cannot be created, or ``root/VOC2012`` holds something else.
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
        raise CSGError(f'{home.parent} cannot be created ({error.strerror}); draw into another folder') from error
    # Renamed in the last step, so an interrupted run leaves no incomplete data set.
    with writing(home), tempfile.TemporaryDirectory(prefix='.drawing-', dir=home.parent) as scratch:
        partial = Path(scratch) / home.name
        _write_lists(partial, train=train, val=val)
        for split, i in progress(jobs) if progress else jobs:
            image, labels = draw_image(np.random.default_rng([seed, split, i]), size, lead=i)
            _write_pair(partial, _name(split, i), image, labels)
        (partial / 'drawn.json').write_text(json.dumps(drawn) + '\n')
        partial.rename(home)
    return home


def draw_image(rng: np.random.Generator, size: int, *, lead: int) -> tuple[ndarray, ndarray]:
    """Draw one scene: a background, clutter and two or three objects, each on top of the previous ones.

    Args:
        rng: source of all random choices.
        size: side in pixels.
        lead: determines the class of the topmost object, ``1 + lead % 20``.

    Returns:
        The image, ``(size, size, 3)`` uint8, and its labels, ``(size, size)`` uint8: 0 for background and clutter, 255
        in a border of one pixel around each object.
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
        # A dark rim and a lighter upper side separate an object from a background in its own hue.
        shade = (0.55 + 0.45 * np.clip(depth / 2, 0, 1)) * (1 - 0.2 * y)
        cover = np.clip(depth + 0.5, 0, 1)[..., None]
        image += cover * (paint * shade[..., None] - image)
        inside = depth > 0
        labels[_grow(inside) & ~inside] = IGNORE if label else 0
        labels[inside] = label
    return _light(rng, image), labels


def _place(rng: np.random.Generator, size: int, *, small: bool) -> tuple[ndarray, ndarray, float]:
    """Return an object's own coordinates at each pixel, and its radius in pixels."""
    radius = size * (rng.uniform(0.08, 0.18) if small else rng.uniform(0.25, 0.42))
    down, right = np.indices((size, size)) - rng.uniform(0.2, 0.8, (2, 1, 1)) * size
    angle = rng.uniform(-np.pi, np.pi) if small else rng.normal(0, 0.25)
    x = (np.cos(angle) * right + np.sin(angle) * down) / radius
    y = (np.cos(angle) * down - np.sin(angle) * right) / radius
    x, y = x * rng.choice([-1, 1]), y * rng.uniform(0.85, 1.2)
    return x.astype(np.float32), y.astype(np.float32), radius


def _clutter(rng: np.random.Generator) -> tuple[Field, str, float]:
    """Return an object without a class: a star-shaped blob in any texture and hue."""
    lobes, reach, phase = rng.integers(2, 7), rng.uniform(0.1, 0.4), rng.uniform(0, 6)

    def blob(x: ndarray, y: ndarray) -> ndarray:
        return 0.7 + reach * np.sin(lobes * np.arctan2(y, x) + phase) - np.hypot(x, y)

    return blob, rng.choice(list(TEXTURES)), rng.uniform()


def _background(rng: np.random.Generator, size: int) -> ndarray:
    """Draw clouds, a horizon or one of the textures, ``(size, size, 3)`` from 0 to 1."""
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
    """Draw smooth noise from 0 to 1, interpolated between a number of cells along each side."""
    coarse = Image.fromarray(rng.uniform(size=(cells, cells)).astype(np.float32))
    return np.asarray(coarse.resize((size, size), Image.Resampling.BILINEAR))


def _paint(rng: np.random.Generator, tones: ndarray, hue: float, vivid: float) -> ndarray:
    """Map tones ``(h, w)`` from 0 to 1 to a mix of two colours of nearly the same hue, ``(h, w, 3)``."""
    light, dark = rng.uniform(0.6, 0.8), rng.uniform(0.25, 0.4)
    one = _colour(hue, vivid, light)
    other = _colour(hue + rng.normal(0, 0.03), vivid, dark)
    return one + tones[..., None] * (other - one)


def _colour(hue: float, vivid: float, lightness: float) -> ndarray:
    return lightness + vivid * np.cos(2 * np.pi * (hue - np.arange(3) / 3))


def _light(rng: np.random.Generator, image: ndarray) -> ndarray:
    """Add light from one side, the camera's gain and noise, and round to bytes."""
    size = len(image)
    across, down = rng.uniform(-0.2, 0.2, 2)
    ramp = np.linspace(-1, 1, size)
    lamp = rng.uniform(0.8, 1.2) * (1 + across * ramp + down * ramp[:, None])
    noise = rng.normal(0, rng.uniform(0.01, 0.04), image.shape)
    return np.clip(255 * (image * lamp[..., None] + noise), 0, 255).astype(np.uint8)


def _grow(inside: ndarray) -> ndarray:
    """Extend a mask by the pixels that touch it, corners included."""
    padded = np.pad(inside, 1)
    tall = padded[:-2] | padded[1:-1] | padded[2:]
    return tall[:, :-2] | tall[:, 1:-1] | tall[:, 2:]


def palette() -> list[int]:
    """Return VOC's 256 colours, red, green and blue in turn; the bits of a class id alternate between the channels."""
    return [
        sum(((index >> (3 * bit + channel)) & 1) << (7 - bit) for bit in range(3))
        for index in range(256)
        for channel in range(3)
    ]


def _is_there(home: Path, drawn: dict[str, int]) -> bool:
    """Whether ``home`` holds this data set; anything else there is an error."""
    if not home.exists():
        return False
    record = home / 'drawn.json'
    try:
        found = json.loads(record.read_text())
    except (OSError, ValueError):
        raise CSGError(
            f'{home} exists, but its drawn.json cannot be read; move it away or draw into another folder'
        ) from None
    if found != drawn:
        raise CSGError(f'{home} was drawn with {found}, not {drawn}; move it away or draw into another folder')
    images, masks = (len(list(home.glob(files))) for files in ('JPEGImages/*.jpg', 'SegmentationClass/*.png'))
    wanted = drawn['train'] + drawn['val']
    if not images == masks == wanted:
        raise CSGError(f'{home} lacks files ({images} images and {masks} masks of {wanted}); delete it and draw again')
    return True


def _name(split: int, index: int) -> str:
    return f'{SPLITS[split]}_{index:05d}'


def _write_lists(home: Path, **counts: int) -> None:
    for folder in ('JPEGImages', 'SegmentationClass', 'ImageSets/Segmentation'):
        (home / folder).mkdir(parents=True)
    names = {split: [_name(i, k) for k in range(counts[split])] for i, split in enumerate(SPLITS)}
    names['trainval'] = names['train'] + names['val']
    for split, lines in names.items():
        (home / 'ImageSets/Segmentation' / f'{split}.txt').write_text('\n'.join(lines) + '\n')


def _write_pair(home: Path, name: str, image: ndarray, labels: ndarray) -> None:
    Image.fromarray(image).save(home / 'JPEGImages' / f'{name}.jpg', quality=92)
    mask = Image.fromarray(labels)
    mask.putpalette(palette())
    mask.save(home / 'SegmentationClass' / f'{name}.png')
