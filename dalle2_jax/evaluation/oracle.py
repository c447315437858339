"""An oracle without a network: reads an image of captioned shapes back into a `Scene`, by colour and by outline.

    reading = read(image)                      # Scene, or None: "none", where the image is no clean scene
    score(images, scenes)                      # {"color": 0.98, "background": 1.0, "shape": 0.9, ..., "all": 0.88}

How it reads: the frame's median colour is the background; what differs from it falls into connected parts, one or two
of which are objects; an object's colour is the median of its best covered pixels, and from both colours each pixel's
coverage follows. Coverage is compared with the four shapes as `data.scene` draws them, moved and sized by centroid and
area, which blur leaves in place. Blends of two images give colours off the palette or flat half-covered areas; noise
gives no even frame.
"""

from collections.abc import Sequence

import numpy as np

from dalle2_jax.data.sources.scene import BACKGROUNDS, BRIGHTNESS, COLORS, EXTENTS, SHAPES, Scene, SceneObject, coverage
from dalle2_jax.errors import InputError

SIDE = 64  # every image is looked at in this size
COLOR_TOLERANCE = 45  # of the largest channel difference; a half blend with any background is 60 or more away
CONTRAST = 60  # a pixel this far from the background belongs to something
BORDER = 2  # width of the frame in pixels
BORDER_SHARE = 0.9  # of the frame must have the background's colour
LEAST_AREA = 40  # pixels of the smallest object; a small cross beside another object has 110,
LEAST_SHARE = 0.1  # and at least this share of the largest object's; beside a large square it has 0.14
SPECKS_SHARE = 0.15  # of the objects' area may lie about in smaller parts
CORE_SHARE = 0.4  # of an object's pixels tell its colour
ASTRAY_SHARE = 0.1  # of an object's pixels may lie off the way from the background's colour to its own
EDGE = 3  # erosions that leave nothing of a blurred edge
BLURS = (0.0, 0.8, 1.6, 2.4)  # standard deviations in pixels
LEAST_OVERLAP = 0.77  # intersection over union with the best shape
LEAST_MARGIN = 0.03  # and how much it lies above the second best
AREA = {"circle": np.pi / 4, "square": 1.0, "triangle": 0.5, "cross": 5 / 9}  # of the bounding box
CENTROID = {"circle": 0.0, "square": 0.0, "triangle": 1 / 6, "cross": 0.0}  # below the box's centre, of the extent
ATTRIBUTES = ("color", "background", "shape", "size", "relation")


def _at_side(image: np.ndarray) -> np.ndarray:
    image = np.asarray(image)
    if image.ndim != 3 or image.shape[-1] != 3 or image.dtype != np.uint8 or min(image.shape) < 1:
        raise InputError(f"the oracle reads uint8 [height, width, 3] images, not {image.dtype} {image.shape}")
    if image.shape[:2] != (SIDE, SIDE):
        from PIL import Image

        image = np.asarray(Image.fromarray(image).resize((SIDE, SIDE), Image.Resampling.BICUBIC))
    return image.astype(np.float32)


def _nearest(color: np.ndarray, known: dict, tolerance: float) -> str | None:
    distances = {name: np.abs(np.asarray(value) - color).max() for name, value in known.items()}
    name = min(distances, key=distances.get)
    return name if distances[name] <= tolerance else None


_MIDDLE = {name: np.asarray(value) * np.mean(BRIGHTNESS) for name, value in COLORS.items()}


def _parts(mask: np.ndarray) -> list[np.ndarray]:
    """The 4-connected parts of a mask, largest first, by joining the runs of each row with those of the row above."""
    parent: list[int] = []

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    edges = np.diff(np.pad(mask.astype(np.int8), ((0, 0), (1, 1))), axis=1)
    rows, starts = np.nonzero(edges == 1)
    _, ends = np.nonzero(edges == -1)
    runs = list(zip(rows.tolist(), starts.tolist(), ends.tolist(), strict=True))
    above: list[int] = []
    current: list[int] = []
    row_now = -1
    for i, (row, start, end) in enumerate(runs):
        if row != row_now:
            above, current, row_now = (current if row == row_now + 1 else []), [], row
        parent.append(i)
        current.append(i)
        for j in above:
            if runs[j][1] < end and start < runs[j][2]:
                parent[root(j)] = root(i)
    labels: dict[int, np.ndarray] = {}
    for i, (row, start, end) in enumerate(runs):
        labels.setdefault(root(i), np.zeros(mask.shape, bool))[row, start:end] = True
    return sorted(labels.values(), key=lambda part: -int(part.sum()))


def _erode(mask: np.ndarray) -> np.ndarray:
    inside = mask.copy()
    inside[1:] &= mask[:-1]
    inside[:-1] &= mask[1:]
    inside[:, 1:] &= mask[:, :-1]
    inside[:, :-1] &= mask[:, 1:]
    return inside


def _dilate(mask: np.ndarray, times: int) -> np.ndarray:
    for _ in range(times):
        mask = ~_erode(~mask)
    return mask


def _blur(sigma: float) -> np.ndarray:
    """The matrix of a Gaussian blur along one axis of SIDE pixels."""
    if sigma == 0:
        return np.eye(SIDE)
    weights = np.exp(-0.5 * (np.subtract.outer(np.arange(SIDE), np.arange(SIDE)) / sigma) ** 2)
    return weights / weights.sum(1, keepdims=True)


_BLURS = tuple(_blur(sigma) for sigma in BLURS)


def overlaps(covered: np.ndarray) -> dict[str, float]:
    """Intersection over union of a coverage map [SIDE, SIDE] with each shape, as blurred as fits it best.

    The shape is drawn with the map's area and its centroid in the same place.
    """
    area = float(covered.sum())
    at = np.arange(SIDE) + 0.5
    x, y = float(covered.sum(0) @ at) / area, float(covered.sum(1) @ at) / area
    found = {}
    for shape in SHAPES:
        extent = np.sqrt(area / AREA[shape])
        center = (x / SIDE, (y - CENTROID[shape] * extent) / SIDE)
        sharp = coverage(shape, center, extent / SIDE, SIDE)
        shared = [np.minimum(covered, blur @ sharp @ blur.T).sum() for blur in _BLURS]
        found[shape] = float(max(s / (area + sharp.sum() - s) for s in shared))
    return found


def _read_object(image: np.ndarray, part: np.ndarray, background: np.ndarray, count: int) -> SceneObject | None:
    # The colour of the pixels that differ most from the background: where a blurred object is covered best.
    distance = np.abs(image - background).max(-1)
    core = part & (distance >= np.quantile(distance[part], 1 - CORE_SHARE))
    color = np.median(image[core], axis=0)
    name = _nearest(color, _MIDDLE, COLOR_TOLERANCE)
    if name is None:
        return None
    # How far each pixel has gone from the background's colour to the object's, and how far off that way it lies.
    direction = color - background
    gone = (image - background) @ direction / (direction @ direction)
    astray = np.abs(image - background - gone[..., None] * direction).max(-1)
    if np.mean(astray[part] > CONTRAST) > ASTRAY_SHARE:
        return None
    covered = np.clip(gone, 0, 1) * _dilate(part, 2)
    half = (covered > 0.25) & (covered < 0.75)
    for _ in range(EDGE):
        half = _erode(half)
    if half.any():  # half covered over more than an edge's width: two images in one
        return None
    rows, columns = np.nonzero((covered > 0.5).any(1))[0], np.nonzero((covered > 0.5).any(0))[0]
    extent = max(np.ptp(rows), np.ptp(columns)) + 1
    threshold = (EXTENTS[count]["small"][1] + EXTENTS[count]["large"][0]) / 2
    best = overlaps(covered)
    second, first = sorted(best.values())[-2:]
    clear = first >= LEAST_OVERLAP and first - second >= LEAST_MARGIN
    return SceneObject(
        shape=max(best, key=best.get) if clear else None,
        color=name,
        size="large" if extent / SIDE > threshold else "small",
        center=(float(columns[0] + columns[-1] + 1) / 2 / SIDE, float(rows[0] + rows[-1] + 1) / 2 / SIDE),
        extent=float(extent / SIDE),
    )


def _relation(first: SceneObject, second: SceneObject) -> str:
    right, down = first.center[0] - second.center[0], first.center[1] - second.center[1]
    if abs(right) > abs(down):
        return "right of" if right > 0 else "left of"
    return "below" if down > 0 else "above"


def read(image: np.ndarray) -> Scene | None:
    """What an image uint8 [h, w, 3] shows, or None for a blank, noise, a blend or whatever else is no clean scene.

    An object whose outline is like none of the shapes has shape None; its other attributes are read all the same.
    """
    image = _at_side(image)
    frame = np.ones((SIDE, SIDE), bool)
    frame[BORDER:-BORDER, BORDER:-BORDER] = False
    background = np.median(image[frame], axis=0)
    name = _nearest(background, BACKGROUNDS, COLOR_TOLERANCE)
    distance = np.abs(image - background).max(-1)
    if name is None or np.mean(distance[frame] < CONTRAST) < BORDER_SHARE:
        return None
    parts = _parts(distance > CONTRAST)
    least = max(LEAST_AREA, LEAST_SHARE * int(parts[0].sum())) if parts else LEAST_AREA
    large = [part for part in parts if part.sum() >= least]
    area = sum(int(part.sum()) for part in large)
    if len(large) not in (1, 2) or sum(int(part.sum()) for part in parts) - area > SPECKS_SHARE * area:
        return None
    objects = [_read_object(image, part, background, len(large)) for part in large]
    if None in objects:
        return None
    relation = _relation(*objects) if len(objects) == 2 else None
    return Scene(name, tuple(objects), relation)


def _fit(stated: Scene, placed: Sequence[SceneObject]) -> dict[str, bool]:
    """The attributes of the objects, each with whether all that is stated of it holds; ordered as in `stated`."""
    pairs = list(zip(stated.objects, placed, strict=True))
    fit = {}
    for name in ("color", "shape", "size"):
        stated_and_read = [(getattr(a, name), getattr(b, name)) for a, b in pairs if getattr(a, name) is not None]
        if stated_and_read:
            fit[name] = all(want == have for want, have in stated_and_read)
    if stated.relation is not None:
        fit["relation"] = _relation(*placed) == stated.relation
    return fit


def judge(reading: Scene | None, stated: Scene) -> dict[str, bool]:
    """Which of the attributes that `stated` says (None is unsaid) a reading has right, and "all" of them at once.

    `stated` is a scene or a parsed caption. With None as the reading everything is wrong; with another number of
    objects all but the background is. Two objects are matched in the order that fits best, before the relation is
    asked for.
    """
    # No attribute is None in a statement, so that an unknown object has them all wrong.
    right = dict.fromkeys(_fit(stated, [SceneObject(center=(0.0, 0.0))] * len(stated.objects)), False)
    if reading is not None and len(reading.objects) == len(stated.objects):
        orders = (reading.objects, reading.objects[::-1])
        fits = [_fit(stated, placed) for placed in orders]
        right = max(fits, key=lambda fit: (sum(v for k, v in fit.items() if k != "relation"), fit.get("relation", 0)))
    if stated.background is not None:
        right["background"] = reading is not None and reading.background == stated.background
    return {**right, "all": reading is not None and all(right.values())}


def judge_all(images: Sequence[np.ndarray], scenes: Sequence[Scene]) -> list[dict[str, bool]]:
    """`judge` of each image [b, h, w, 3] against its scene or parsed caption."""
    return [judge(read(image), scene) for image, scene in zip(images, scenes, strict=True)]


def summarize(judged: Sequence[dict[str, bool]]) -> dict[str, float]:
    """The fraction of right answers for each attribute, over the images for which it is stated."""
    fractions = {}
    for name in (*ATTRIBUTES, "all"):
        answers = [item[name] for item in judged if name in item]
        if answers:
            fractions[name] = float(np.mean(answers))
    return fractions


def score(images: Sequence[np.ndarray], scenes: Sequence[Scene]) -> dict[str, float]:
    """Fractions of images with the right "color", "background", "shape", "size", ("relation",) and "all"."""
    return summarize(judge_all(images, scenes))
