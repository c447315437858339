"""Scenes of one or two coloured shapes: what they are, how they are drawn, and what is said of them.

A `Scene` is drawn by `draw` and described by `full_caption` and `partial_captions`; `parse_caption` reads a caption of
the grammar back into a `Scene` whose unsaid attributes are None, so that "a red circle" and an image can be compared.
"""

import dataclasses
import json
import re

import numpy as np

from dalle2_jax.errors import InputError

SHAPES = ("circle", "square", "triangle", "cross")
COLORS = {
    "red": (250, 5, 5),
    "green": (5, 250, 5),
    "blue": (5, 5, 250),
    "yellow": (250, 250, 5),
    "cyan": (5, 250, 250),
    "purple": (235, 5, 250),
}
BACKGROUNDS = {"white": (255, 255, 255), "gray": (128, 128, 128), "black": (0, 0, 0)}
SIZES = ("small", "large")
RELATIONS = ("above", "below", "left of", "right of")
INVERSE = {"above": "below", "below": "above", "left of": "right of", "right of": "left of"}

# (shape, color) pairs that no split but `unseen` shows or names: every shape once, so that colours and shapes have to
# be put together anew.
HELD_OUT_PAIRS = (("circle", "red"), ("square", "blue"), ("triangle", "yellow"), ("cross", "green"))
SEEN_PAIRS = tuple((shape, color) for shape in SHAPES for color in COLORS if (shape, color) not in HELD_OUT_PAIRS)

# Extents and places as fractions of the image's side; in the comments, pixels of a 64 px image. Two objects share
# the frame, so each is smaller: `size` is relative to the number of objects.
EXTENTS = {
    1: {"small": (0.42, 0.47), "large": (0.68, 0.76)},  # 27-30 and 44-49
    2: {"small": (0.22, 0.25), "large": (0.41, 0.435)},  # 14-16 and 26-28
}
JITTER = {1: 0.09, 2: 0.07}  # of the centre: 6 and 4.5
MARGIN = 0.03  # kept free at the frame: 2
GAP = 0.05  # kept free between two objects: 3
BRIGHTNESS = (0.94, 1.0)


@dataclasses.dataclass(frozen=True)
class SceneObject:
    """One shape. None stands for what a caption leaves unsaid (or what a reader cannot tell).

    `center` is (x, y) and `extent` the side of the bounding box, both as fractions of the image's side, y downwards.
    """

    shape: str | None = None
    color: str | None = None
    size: str | None = None
    center: tuple[float, float] | None = None
    extent: float | None = None
    brightness: float = 1.0


@dataclasses.dataclass(frozen=True)
class Scene:
    """A background and its objects; with two, `relation` says where the first is as seen from the second."""

    background: str | None = None
    objects: tuple[SceneObject, ...] = ()
    relation: str | None = None

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "Scene":
        fields = json.loads(text)
        objects = []
        for item in fields["objects"]:
            center = None if item["center"] is None else tuple(item["center"])
            objects.append(SceneObject(**{**item, "center": center}))
        return cls(fields["background"], tuple(objects), fields["relation"])


# --- making and drawing scenes ---------------------------------------------------------------------------------------


def place_one(rng: np.random.Generator, background: str, shape: str, color: str, size: str) -> Scene:
    """A scene of one object near the centre; place, extent and brightness are drawn from `rng`."""
    extent = rng.uniform(*EXTENTS[1][size])
    x, y = 0.5 + rng.uniform(-JITTER[1], JITTER[1], 2)
    made = SceneObject(shape, color, size, (float(x), float(y)), float(extent), float(rng.uniform(*BRIGHTNESS)))
    return Scene(background, (made,))


def place_two(rng: np.random.Generator, background: str, relation: str, kinds: list[tuple[str, str, str]]) -> Scene:
    """A scene of two objects, each a (shape, color, size), of which the first stands in `relation` to the second."""
    extents = [rng.uniform(*EXTENTS[2][size]) for _, _, size in kinds]
    # Along the relation's axis: margin, the earlier object, gap, the later object, margin, and the slack shared out.
    order = (0, 1) if relation in ("above", "left of") else (1, 0)
    slack = 1 - 2 * MARGIN - GAP - sum(extents)
    before, between, _ = slack * rng.dirichlet((1, 1, 1))
    first, second = (extents[i] for i in order)
    start = MARGIN + before
    along = {order[0]: start + first / 2, order[1]: start + first + GAP + between + second / 2}
    across = 0.5 + rng.uniform(-JITTER[2], JITTER[2], 2)
    vertical = relation in ("above", "below")
    objects = []
    for i, (shape, color, size) in enumerate(kinds):
        center = (float(across[i]), float(along[i])) if vertical else (float(along[i]), float(across[i]))
        objects.append(SceneObject(shape, color, size, center, float(extents[i]), float(rng.uniform(*BRIGHTNESS))))
    return Scene(background, tuple(objects), relation)


def _span(u: np.ndarray, half: float) -> np.ndarray:
    """How much of each unit interval centred at `u` lies in [-half, half]."""
    return np.clip(np.minimum(u + 0.5, half) - np.maximum(u - 0.5, -half), 0, 1)


def coverage(shape: str, center: tuple[float, float], extent: float, image_size: int) -> np.ndarray:
    """The share of each pixel that the shape covers, float [image_size, image_size]; fractions as in SceneObject."""
    x = np.arange(image_size) + 0.5 - center[0] * image_size
    y = np.arange(image_size) + 0.5 - center[1] * image_size
    half = extent * image_size / 2
    if shape == "circle":
        return np.clip(half - np.hypot(x[None, :], y[:, None]) + 0.5, 0, 1)
    if shape == "square":
        return _span(y, half)[:, None] * _span(x, half)[None, :]
    if shape == "triangle":  # apex above, base as wide as the box
        distance = (2 * np.abs(x)[None, :] - (y + half)[:, None]) / np.sqrt(5)
        return np.clip(0.5 - distance, 0, 1) * _span(y, half)[:, None]
    if shape == "cross":  # a plus sign with arms a third wide
        wide_x, wide_y, arm_x, arm_y = _span(x, half), _span(y, half), _span(x, half / 3), _span(y, half / 3)
        return wide_y[:, None] * arm_x[None, :] + (arm_y[:, None] * (wide_x - arm_x)[None, :])
    raise InputError(f"there is no shape {shape!r}; the shapes are {', '.join(SHAPES)}")


def draw(scene: Scene, image_size: int = 64) -> np.ndarray:
    """The scene as an image, uint8 [image_size, image_size, 3], with smooth edges."""
    background = np.asarray(BACKGROUNDS[scene.background], np.float64)
    image = np.broadcast_to(background, (image_size, image_size, 3))
    for item in scene.objects:
        color = np.asarray(COLORS[item.color]) * item.brightness
        covered = coverage(item.shape, item.center, item.extent, image_size)[..., None]
        image = image + covered * (color - image)
    return np.rint(image).astype(np.uint8)


# --- the grammar -----------------------------------------------------------------------------------------------------


def _noun(item: SceneObject, said: frozenset[str] | set[str], something: bool = False) -> str:
    if something and said == {"color"}:
        return f"something {item.color}"
    words = [getattr(item, name) for name in ("size", "color", "shape") if name in said]
    return " ".join(["a", *words] if "shape" in said else ["a", *words, "shape"])


def full_caption(scene: Scene) -> str:
    """The caption that says everything: "a small red circle above a large blue square on a gray background"."""
    nouns = [_noun(item, {"size", "color", "shape"}) for item in scene.objects]
    return f"{f' {scene.relation} '.join(nouns)} on a {scene.background} background"


def _partial_caption(rng: np.random.Generator, scene: Scene) -> str:
    names = np.array(["size", "color", "shape"])
    related = len(scene.objects) == 2 and rng.random() < 0.5
    about = scene.objects if related else (scene.objects[rng.integers(len(scene.objects))],)
    said = [set(names[rng.random(3) < 0.5].tolist()) for _ in about]
    background = rng.random() < 0.4
    if not related and not said[0]:
        return f"a {scene.background} background"
    something = rng.random() < 0.5
    text = f" {scene.relation} ".join(_noun(item, s, something) for item, s in zip(about, said, strict=True))
    return f"{text} on a {scene.background} background" if background else text


def partial_captions(rng: np.random.Generator, scene: Scene, count: int = 3) -> list[str]:
    """`count` distinct true captions that leave something out, as people do: "a circle", "something red"."""
    full, found = full_caption(scene), []
    while len(found) < count:
        caption = _partial_caption(rng, scene)
        if caption != full and caption not in found:
            found.append(caption)
    return found


def _noun_pattern(tag: str) -> str:
    return (
        rf"(?:a (?:(?P<size{tag}>{'|'.join(SIZES)}) )?(?:(?P<color{tag}>{'|'.join(COLORS)}) )?"
        rf"(?P<shape{tag}>{'|'.join(SHAPES)}|shape)|something (?P<other{tag}>{'|'.join(COLORS)}))"
    )


_CAPTION = re.compile(
    rf"(?:{_noun_pattern('1')}(?: (?P<relation>{'|'.join(RELATIONS)}) {_noun_pattern('2')})?"
    rf"(?: on a (?P<background>{'|'.join(BACKGROUNDS)}) background)?|a (?P<only>{'|'.join(BACKGROUNDS)}) background)"
)


def parse_caption(caption: str) -> Scene:
    """What a caption states, as a Scene with None for what it leaves unsaid (no objects for "a gray background").

    Case and white space do not matter. Raises InputError for a caption outside the grammar.
    """
    match = _CAPTION.fullmatch(" ".join(caption.lower().split()))
    if match is None:
        example = "a small red circle on a gray background"
        raise InputError(f"the caption {caption!r} is outside the grammar of captioned shapes (such as {example!r})")
    found = match.groupdict()
    objects = []
    for tag in "12":
        shape, color = found[f"shape{tag}"], found[f"color{tag}"] or found[f"other{tag}"]
        if shape or color:
            objects.append(SceneObject(None if shape == "shape" else shape, color, found[f"size{tag}"]))
    return Scene(found["background"] or found["only"], tuple(objects), found["relation"])


def _object_fits(stated: SceneObject, actual: SceneObject) -> bool:
    return all(getattr(stated, name) in (None, getattr(actual, name)) for name in ("shape", "color", "size"))


def fits(stated: Scene, actual: Scene) -> bool:
    """Whether everything that `stated` (of `parse_caption`) says is true of `actual`."""
    if stated.background not in (None, actual.background):
        return False
    if len(stated.objects) < 2:
        return all(any(_object_fits(said, item) for item in actual.objects) for said in stated.objects)
    if len(actual.objects) < 2:
        return False
    first, second = actual.objects
    for pair, relation in (((first, second), actual.relation), ((second, first), INVERSE[actual.relation])):
        if relation == stated.relation and all(map(_object_fits, stated.objects, pair)):
            return True
    return False
