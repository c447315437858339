"""People's own images: a folder of image files and their captions.

A caption is the text of `NAME.txt` beside `NAME.png` (each line one more caption), or a line of one `metadata.jsonl`
or `metadata.csv` in the folder, with `file_name` and `text`. Folders within are read too. Which split an image belongs
to follows from its name alone: 90% train, 5% validation, 5% test.

Nothing in a folder stops the reading: what cannot be used is left out and listed, by name, among the problems.
"""

import csv
import dataclasses
import hashlib
import io
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from dalle2_jax.errors import InputError
from dalle2_jax.files import read_bytes, write_atomically
from dalle2_jax.images.read import MOST_BYTES, ImageError, open_image

SPLITS = ("train", "validation", "test")
EXTENSIONS = (
    *(".png", ".jpg", ".jpeg", ".jfif", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".jp2"),
    *(".avif", ".heic", ".heif"),  # named where this Pillow cannot read them
)
SMALLEST_SIDE = 16  # pixels; what is narrower leaves nothing in its central square
MOST_CAPTIONS, MOST_METADATA = 2**20, 2**30  # bytes of a file
METADATA = ("metadata.jsonl", "metadata.csv")


@dataclasses.dataclass(frozen=True)
class Problem:
    """What was left out, by its name in the folder, and why."""

    name: str
    kind: str
    reason: str

    def __str__(self) -> str:
        return f"{self.name}: {self.reason}"


@dataclasses.dataclass(frozen=True)
class FolderImage:
    """An image that can be used: its name in the folder, its captions, its size as shown and its file's mode."""

    name: str
    captions: tuple[str, ...]
    width: int
    height: int
    mode: str

    @property
    def split(self) -> str:
        return split_of(self.name)


@dataclasses.dataclass(frozen=True)
class Folder:
    """What a folder holds: images with captions by name, and what was left out."""

    root: Path
    images: tuple[FolderImage, ...]
    problems: tuple[Problem, ...]

    def split(self, name: str) -> list[FolderImage]:
        """The images of a split, or of several as TFDS joins them ("validation+test"); InputError for others."""
        if not set(wanted := name.split("+")) <= set(SPLITS):
            raise InputError(f"the folder {self.root} has no split {name!r}; it has {', '.join(SPLITS)}")
        return [image for image in self.images if image.split in wanted]

    def problems_by_kind(self) -> dict[str, list[Problem]]:
        """The problems of each kind, in the order of their names."""
        kinds: dict[str, list[Problem]] = {}
        for problem in self.problems:
            kinds.setdefault(problem.kind, []).append(problem)
        return kinds

    def summary(self, names: int = 3) -> str:
        """One line on what is used and what was left out, with a few names a kind."""
        kinds = self.problems_by_kind()
        used = f"{self.root}: {len(self.images)} captioned images"
        if not kinds:
            return used
        parts = []
        for kind, found in kinds.items():
            more = f" and {len(found) - names} more" if len(found) > names else ""
            shown = ", ".join(problem.name for problem in found[:names])
            parts.append(f"{len(found)} {kind} ({shown}{more})")
        return f"{used}; left out: {'; '.join(parts)}. `dalle2 data check {self.root}` says more"


def split_of(name: str) -> str:
    """The split of an image by its name in the folder, with / between folders."""
    number = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") % 20
    return "test" if number == 0 else "validation" if number == 1 else "train"


def read_folder(root: str | Path, cache_dir: str | Path | None = None) -> Folder:
    """Reads every caption and decodes every image once.

    cache_dir: keeps there what was found of each file, so that only new and changed files are decoded the next time.

    Raises:
        InputError: if `root` is no folder, has two metadata files or one that cannot be read as such, or holds no
            captioned image.
    """
    root = Path(root).expanduser()
    if not root.is_dir():
        raise InputError(f"there is no folder {root}; name one with images and captions")
    problems = _Problems()
    files = _files(root, problems)
    captions = _captions(root, files, problems)
    known, found = _read_cache(root, cache_dir), {}
    images = []
    for name, path in files.items():
        facts = found[name] = _facts(path, known.get(name))
        if "problem" in facts:
            problems.add(name, "not usable as images", facts["problem"])
        elif not captions.get(name):
            if name not in problems and (text := _text_name(name)) not in problems:
                problems.add(name, "without a caption", f"there is no {text} and no text in a metadata file")
        else:
            size = {key: facts[key] for key in ("width", "height", "mode")}
            images.append(FolderImage(name, tuple(dict.fromkeys(captions[name])), **size))
    if found != known:
        _write_cache(root, cache_dir, found)
    result = Folder(root, tuple(images), problems.sorted())
    if not images:
        raise InputError(
            f"no captioned image is left in {root}: it has {len(files)} image files "
            f"({', '.join(extension[1:] for extension in EXTENSIONS)}) and {len(result.problems)} problems"
            + (f", the first: {result.problems[0]}" if result.problems else "")
            + "; put NAME.txt beside NAME.png, or a metadata.jsonl with file_name and text"
        )
    return result


class _Problems:
    """Problems as they are found, and which names have one."""

    def __init__(self):
        self._found: list[Problem] = []
        self._names: set[str] = set()

    def add(self, name: str, kind: str, reason: str) -> None:
        self._found.append(Problem(name, kind, reason))
        self._names.add(name)

    def __contains__(self, name: str) -> bool:
        return name in self._names

    def sorted(self) -> tuple[Problem, ...]:
        return tuple(sorted(self._found, key=lambda problem: (problem.kind, problem.name)))


def _files(root: Path, problems: _Problems) -> dict[str, Path]:
    """{name: path} of the image files below `root`, in the order of their names."""
    inside, found = root.resolve(), {}

    def unreadable(error: OSError) -> None:
        name = _printable(Path(error.filename).relative_to(root).as_posix())
        problems.add(name, "unreadable folders", f"it cannot be read ({error.strerror})")

    for folder, folders, names in os.walk(root, onerror=unreadable):
        for name in list(folders):
            path = Path(folder, name)
            if name.startswith("."):
                folders.remove(name)
            elif path.is_symlink():  # os.walk does not follow it
                reason = "it is a link to a folder, and links to folders are not followed"
                problems.add(_printable(path.relative_to(root).as_posix()), "links", reason)
        for name in names:
            path = Path(folder, name)
            if name.startswith(".") or path.suffix.lower() not in EXTENSIONS:
                continue
            short = path.relative_to(root).as_posix()
            if not _is_text(short):
                problems.add(_printable(short), "names that are not UTF-8", "rename it")
            elif reason := _wrong_link(path, inside):
                problems.add(short, "links", reason)
            else:
                found[short] = path
    return dict(sorted(found.items()))


def _is_text(name: str) -> bool:
    """Whether a string is Unicode text: file names of other encodings, and half emoji in JSON, are not."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def _printable(name: str) -> str:
    return name.encode(errors="backslashreplace").decode()


def _wrong_link(path: Path, inside: Path) -> str | None:
    """Why a file is not read for being a link; None where it is none, or one to a file in the folder."""
    try:
        target = path.resolve(strict=True)
    except FileNotFoundError:
        return "it is a link to nothing"
    except (OSError, RuntimeError):  # the latter in Python 3.11 and 3.12
        return "it is a link to itself"
    if not target.is_relative_to(inside):
        return "it is a link out of the folder"
    return None if target.is_file() else "it is a link to a folder"


def _text_name(name: str) -> str:
    return name[: name.rindex(".")] + ".txt"


def _captions(root: Path, files: dict[str, Path], problems: _Problems) -> dict[str, list[str]]:
    """{image name: captions}, from the metadata file and from the text files."""
    present = [name for name in METADATA if (root / name).is_file()]
    if len(present) > 1:
        raise InputError(f"{root} has both {' and '.join(present)}; keep one of them")
    captions: dict[str, list[str]] = {}
    for place, name, texts in _metadata(root / present[0], problems) if present else ():
        name = os.path.normpath(name).replace(os.sep, "/")
        said = [text.strip() for text in texts if text.strip()]
        if name.startswith(("/", "../")):
            problems.add(place, "broken lines of metadata", f"{name} lies outside the folder")
        elif name not in files:
            if name not in problems:
                problems.add(place, "broken lines of metadata", f"there is no image {name}")
        elif not said:
            problems.add(place, "broken lines of metadata", f"its text for {name} is empty")
        else:
            captions.setdefault(name, []).extend(said)
    inside = root.resolve()
    for name in files:
        if name not in captions and os.path.lexists(root / _text_name(name)):
            captions[name] = _lines(root, _text_name(name), inside, problems)
    if not present:
        beside = {_text_name(name) for name in files}
        for path in sorted(root.rglob("*.txt")):
            name = path.relative_to(root).as_posix()
            imaged = name in beside or any(name[:-4] + extension in problems for extension in EXTENSIONS)
            if not imaged and not any(part.startswith(".") for part in path.relative_to(root).parts):
                problems.add(_printable(name), "captions without an image", "no image beside it has its name")
    return captions


def _lines(root: Path, name: str, inside: Path, problems: _Problems) -> list[str]:
    """The captions in one text file."""
    path = root / name
    if reason := _wrong_link(path, inside):
        problems.add(name, "links", reason)
        return []
    try:
        text = read_bytes(path, MOST_CAPTIONS).decode("utf-8-sig")
    except UnicodeDecodeError:
        problems.add(name, "captions that are not UTF-8", "save it as UTF-8")
        return []
    except OSError as error:
        problems.add(name, "without a caption", f"it cannot be read ({error.strerror})")
        return []
    except InputError:
        reason = f"it is no file of captions, or has more than {MOST_CAPTIONS >> 20} MiB"
        problems.add(name, "without a caption", reason)
        return []
    lines = [line.strip() for line in text.split("\n")]
    if not any(lines):
        problems.add(name, "without a caption", "it is empty")
    return [line for line in lines if line]


def _metadata(path: Path, problems: _Problems) -> Iterator[tuple[str, str, list[str]]]:
    """(where, file name, captions) of each line of a metadata file that says both."""
    try:
        text = read_bytes(path, MOST_METADATA).decode("utf-8-sig")
    except UnicodeDecodeError:
        raise InputError(f"{path} is not UTF-8; save it as UTF-8") from None
    for number, row, problem in _csv_rows(path, text) if path.suffix == ".csv" else _json_rows(text):
        place = f"{path.name} line {number}"
        if problem:
            problems.add(place, "broken lines of metadata", problem)
            continue
        name, texts = (row.get("file_name"), row.get("text")) if isinstance(row, dict) else (None, None)
        texts = [texts] if isinstance(texts, str) else texts
        if not isinstance(name, str) or not name:
            problems.add(place, "broken lines of metadata", "it names no file_name")
        elif not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
            problems.add(place, "broken lines of metadata", f"its text for {_printable(name)} is no text")
        elif not all(map(_is_text, (name, *texts))):
            problems.add(place, "broken lines of metadata", "it holds half a character, which is no Unicode text")
        else:
            yield place, name, texts


def _json_rows(text: str) -> Iterator[tuple[int, object, str | None]]:
    """(line number, what the line says, what is wrong with it) of every line that is not empty."""
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            yield number, json.loads(line), None
        except ValueError as error:
            yield number, None, f"it is not JSON ({error})"


def _csv_rows(path: Path, text: str) -> Iterator[tuple[int, object, str | None]]:
    """The same of a table; InputError where a quote is left open, since nobody can say what follows it."""
    rows = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    try:
        missing = {"file_name", "text"} - set(rows.fieldnames or ())
        if missing:
            raise InputError(
                f"{path} has no column {' and no column '.join(sorted(missing))}; its first line names them"
            )
        for row in rows:
            surplus = None in row
            yield rows.line_num, row, "it has more fields than the first line; put its text in quotes" * surplus
    except csv.Error as error:
        raise InputError(f"{path} cannot be read up to line {rows.line_num} ({error}); mend its quotes") from None


def _facts(path: Path, known: dict | None) -> dict:
    """What the file is: size, mode and the stamp it was read at; or the problem with it."""
    status = path.stat()
    stamp = [status.st_size, status.st_mtime_ns]
    if not path.is_file():
        return {"stamp": stamp, "problem": "it is no file"}
    if known is not None and known.get("stamp") == stamp:
        return known
    try:
        image, mode = open_image(str(path))
    except ImageError as error:
        return {"stamp": stamp, "problem": str(error)}
    if min(image.size) < SMALLEST_SIDE:
        size = f"{image.width} x {image.height}"
        return {"stamp": stamp, "problem": f"it has {size} pixels, and a side below {SMALLEST_SIDE}"}
    return {"stamp": stamp, "width": image.width, "height": image.height, "mode": mode}


def _cache_path(root: Path, cache_dir: str | Path) -> Path:
    number = hashlib.sha256(str(root.resolve()).encode()).hexdigest()[:16]
    return Path(cache_dir).expanduser() / "folder" / f"{number}.json"


def _read_cache(root: Path, cache_dir: str | Path | None) -> dict[str, dict]:
    if cache_dir is None:
        return {}
    try:
        return json.loads(_cache_path(root, cache_dir).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def _write_cache(root: Path, cache_dir: str | Path | None, found: dict[str, dict]) -> None:
    if cache_dir is None:
        return
    write_atomically(_cache_path(root, cache_dir), json.dumps(found))


class FolderRecords:
    """The images of one split as records with random access, as a TFDS data source has them."""

    def __init__(self, root: Path, images: Sequence[FolderImage]):
        self._root, self._images = root, list(images)

    def __len__(self) -> int:
        return len(self._images)

    def __getitems__(self, indices: Sequence[int]) -> list[dict]:
        chosen = [self._images[i] for i in indices]
        return [
            {"image": read_bytes(self._root / one.name, MOST_BYTES), "captions": list(one.captions)} for one in chosen
        ]
