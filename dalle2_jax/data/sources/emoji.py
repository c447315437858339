"""The data set `emoji`: 3,655 hand-drawn images with Unicode's names for them, drawn here from a font.

    prepare("data_cache")                          # emoji/unicode_15_0/1.0.0 under the folder
    tfds.data_source("emoji/unicode_15_0", split="train", data_dir="data_cache")

The images are those of Noto Color Emoji (Debian's fonts-noto-color-emoji), at the 109 px strike that the font holds,
on white; the names and groups are those of Unicode's emoji-test.txt (Debian's unicode-data). How many there are follows
that file. Features: `image` (136 px PNG), `captions` (Unicode's name first, then as people would say it), `emoji` (the
characters), `group`, `subgroup`.

An emoji's split follows from its code points alone. In the split `unseen` are combinations of a person and a skin tone
(an astronaut of dark skin tone, say) of which neither occurs together anywhere else, though each does alone.
"""

import dataclasses
import functools
import hashlib
import io
import os
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import tensorflow_datasets as tfds

from dalle2_jax.data.sources.build import prepare_builder
from dalle2_jax.errors import InputError
from dalle2_jax.images.files import png

IMAGE_SIZE = 136
STRIKE = 109  # the only size in the font, in its own points
DRAWN = (136, 128)
SPLITS = ("train", "validation", "test", "unseen")
FONT, TABLE = "NotoColorEmoji.ttf", "emoji-test.txt"
FONT_FOLDERS = ("/usr/share/fonts", "/usr/local/share/fonts", "~/.local/share/fonts", "~/.fonts")
TABLE_FOLDERS = ("/usr/share/unicode/emoji", "/usr/share/unicode")
TONES = tuple(f"{tone} skin tone" for tone in ("light", "medium-light", "medium", "medium-dark", "dark"))

_LINE = re.compile(r"(?P<points>[0-9A-F ]+?)\s*; fully-qualified\s*# \S+ E\d+\.\d+ (?P<name>.+)")


@dataclasses.dataclass(frozen=True)
class Entry:
    """One line of emoji-test.txt."""

    text: str
    name: str
    group: str
    subgroup: str


def read_table(text: str) -> list[Entry]:
    """The fully qualified emoji of an emoji-test.txt, in its order; InputError where there is none."""
    group = subgroup = ""
    found = []
    for line in text.splitlines():
        if line.startswith("# group: "):
            group = line.removeprefix("# group: ").strip()
        elif line.startswith("# subgroup: "):
            subgroup = line.removeprefix("# subgroup: ").strip()
        elif match := _LINE.fullmatch(line.strip()):
            characters = "".join(chr(int(point, 16)) for point in match["points"].split())
            found.append(Entry(characters, match["name"].strip(), group, subgroup))
    if not found:
        raise InputError(f"there is no emoji in it; is it Unicode's {TABLE}?")
    return found


def table_version(text: str) -> str:
    """Unicode's version, such as "15.0"."""
    match = re.search(r"^# Version: (\d+\.\d+)", text, re.MULTILINE)
    return match[1] if match else "unknown"


def person_and_tone(name: str) -> tuple[str, str] | None:
    """("astronaut", "dark skin tone") of "woman astronaut: dark skin tone"; None where there is not one such tone."""
    subject, _, rest = name.partition(": ")
    tones = [part for part in rest.split(", ") if part in TONES]
    if len(tones) != 1:
        return None
    others = [part for part in rest.split(", ") if part not in TONES]
    words = subject.split()
    if len(words) > 1 and words[0] in ("man", "woman", "person"):
        words = words[1:]
    elif words[-1] in ("man", "woman", "person"):
        words = [*words[:-1], "person"]
    return ", ".join([" ".join(words), *others]), tones[0]


def split_of(emoji: Entry) -> str:
    """The split of an emoji: `unseen` for one tone each of a third of the people, else 90%, 5% and 5% by a hash."""
    pair = person_and_tone(emoji.name)
    if pair is not None:
        number = _hash(pair[0]) % (3 * len(TONES))
        if number < len(TONES) and TONES[number] == pair[1]:
            return "unseen"
    number = _hash(emoji.text) % 20
    return "test" if number == 0 else "validation" if number == 1 else "train"


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def captions(emoji: Entry) -> list[str]:
    """Unicode's name, then other true captions: "woman astronaut: dark skin tone", "a woman astronaut with dark skin
    tone", "a woman astronaut"."""
    subject, _, rest = emoji.name.partition(": ")
    if subject == "flag" and rest:
        said = [f"the flag of {rest}"]
    elif subject == "keycap":
        said = [f"the key {rest}"]
    else:
        said = [_with_article(subject)]
        if rest:
            said.insert(0, f"{said[0]} with {rest}")
    return [emoji.name, *(caption for caption in said if caption != emoji.name)]


def _with_article(words: str) -> str:
    first, last = words.split()[0], words.split()[-1]
    if first[0].isdigit() or first.isupper() or (last.endswith("s") and not last.endswith("ss")):
        return words
    return f"{'an' if first[0].lower() in 'aeiou' else 'a'} {words}"


class Painter:
    """Draws emoji with the font in `path`.

    Raises InputError where Pillow cannot read the font, or cannot join sequences (that needs libraqm and libfribidi).
    """

    def __init__(self, path: str):
        from PIL import ImageFont, features

        if not features.check("raqm") or not features.check("fribidi"):
            raise InputError(
                "emoji of several characters fall apart without libfribidi; install it (Debian and Ubuntu: apt install "
                "libfribidi0) and use a Pillow with raqm, as the one of PyPI is"
            )
        try:
            # As a file, since Pillow looks elsewhere for a font of the same name where a path is none.
            file = io.BytesIO(Path(path).read_bytes())
            self._font = ImageFont.truetype(file, STRIKE, layout_engine=ImageFont.Layout.RAQM)
        except OSError as error:
            raise InputError(
                f"{path} cannot be read as a font with images of {STRIKE} px ({error}); install {FONT} (Debian and "
                "Ubuntu: apt install fonts-noto-color-emoji)"
            ) from error

    def draw(self, text: str) -> np.ndarray:
        """One emoji on white, uint8 [136, 136, 3]; InputError where the font has no single image for it."""
        from PIL import Image, ImageDraw

        box = self._font.getbbox(text)
        if (box[2] - box[0], box[3] - box[1]) != DRAWN:
            points = " ".join(f"U+{ord(character):04X}" for character in text)
            raise InputError(f"the font has no single image for {points}; use {FONT} of the same Unicode version")
        image = Image.new("RGBA", (IMAGE_SIZE, IMAGE_SIZE), "white")
        corner = (-box[0], (IMAGE_SIZE - DRAWN[1]) // 2 - box[1])
        ImageDraw.Draw(image).text(corner, text, font=self._font, embedded_color=True)
        return np.asarray(image.convert("RGB"))


@dataclasses.dataclass(kw_only=True)
class EmojiConfig(tfds.core.BuilderConfig):
    """Where the font and the table are; `prepare` finds them."""

    font: str = ""
    table: str = ""


class Emoji(tfds.core.GeneratorBasedBuilder):
    """Noto's images of Unicode's emoji, with their names."""

    VERSION = tfds.core.Version("1.0.0")  # of how they are drawn, captioned and split
    BUILDER_CONFIGS = []  # one for each version of the table: `prepare` makes it
    url_infos = None  # nothing is downloaded

    def _info(self) -> tfds.core.DatasetInfo:
        features = tfds.features.FeaturesDict(
            {
                "image": tfds.features.Image(shape=(IMAGE_SIZE, IMAGE_SIZE, 3), encoding_format="png"),
                "captions": tfds.features.Sequence(tfds.features.Text()),
                "emoji": tfds.features.Text(),
                "group": tfds.features.Text(),
                "subgroup": tfds.features.Text(),
            }
        )
        return tfds.core.DatasetInfo(builder=self, features=features, disable_shuffling=True)

    def _split_generators(self, dl_manager):
        return {split: self._generate_examples(split) for split in SPLITS}

    @functools.cached_property
    def _painter(self) -> Painter:
        return Painter(self.builder_config.font)

    def _generate_examples(self, split: str) -> Iterator[tuple[int, dict]]:
        table = read_table(Path(self.builder_config.table).read_text(encoding="utf-8"))
        for index, emoji in enumerate(table):
            if split_of(emoji) == split:
                image = png(self._painter.draw(emoji.text))
                said = {"emoji": emoji.text, "group": emoji.group, "subgroup": emoji.subgroup}
                yield index, {"image": image, "captions": captions(emoji), **said}


def find_font() -> str:
    """The font's path; InputError, naming the package, where there is none. DALLE2_EMOJI_FONT goes before all."""
    return _find("DALLE2_EMOJI_FONT", FONT, FONT_FOLDERS, "fonts-noto-color-emoji")


def find_table() -> str:
    """The table's path; InputError, naming the package, where there is none. DALLE2_EMOJI_TABLE goes before all."""
    return _find("DALLE2_EMOJI_TABLE", TABLE, TABLE_FOLDERS, "unicode-data")


def _find(variable: str, name: str, folders: tuple[str, ...], package: str) -> str:
    named = os.environ.get(variable)
    if named:
        if not Path(named).is_file():
            raise InputError(f"{variable} names {named}, which is no file; name {name}, or unset it")
        return named
    for folder in folders:
        found = sorted(Path(folder).expanduser().rglob(name)) if Path(folder).expanduser().is_dir() else []
        if found:
            return str(found[0])
    raise InputError(
        f"the emoji data set needs {name}; install it (Debian and Ubuntu: apt install {package}) or name it by the "
        f"environment variable {variable}"
    )


def prepare(data_dir: str, config: str | None = None) -> Emoji:
    """The prepared builder; draws the data set under `data_dir` first where it is not there yet.

    `config` None is the one that is prepared there, else that of the Unicode version of this machine's table. Raises
    InputError where something is missing that drawing needs.
    """
    ready = sorted(Path(data_dir).expanduser().glob(f"emoji/{config or '*'}/{Emoji.VERSION}/dataset_info.json"))
    if ready:
        settings, message = EmojiConfig(name=ready[-1].parent.parent.name), ""
    else:
        table, font = find_table(), find_font()
        try:
            text = Path(table).read_text(encoding="utf-8")
            count = len(read_table(text))
        except ValueError as error:
            raise InputError(f"{table} cannot be used: {error}") from error
        Painter(font)
        settings = EmojiConfig(name=f"unicode_{table_version(text).replace('.', '_')}", font=font, table=table)
        if config not in (None, settings.name):
            raise InputError(f"emoji has no config {config!r} here; {table} is that of {settings.name}")
        message = f"drawing emoji/{settings.name}: {count} images"
    make = functools.partial(Emoji, data_dir=str(Path(data_dir).expanduser()), config=settings)
    return prepare_builder(functools.partial(make, file_format="array_record"), data_dir, message)
