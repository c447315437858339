"""People's own pictures: a folder of picture files and their captions.

A caption is the text of `NAME.txt` beside `NAME.png` (each line one more caption), or a line of one `metadata.jsonl`
or `metadata.csv` in the folder, with `file_name` and `text`. Folders within are read too. Which split a picture belongs
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

from dalle2_jax.data.picture import PictureError, open_picture

SPLITS = ("train", "validation", "test")
EXTENSIONS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
SMALLEST_SIDE = 16  # pixels; what is narrower leaves nothing in its central square
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
class Picture:
    """A picture that can be used: its name in the folder, its captions, its size as shown and its file's mode."""

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
    """What a folder holds: pictures with captions by name, and what was left out."""

    root: Path
    pictures: tuple[Picture, ...]
    problems: tuple[Problem, ...]

    def split(self, name: str) -> list[Picture]:
        """The pictures of a split, or of several as TFDS joins them ("validation+test"); ValueError for others."""
        if not set(wanted := name.split("+")) <= set(SPLITS):
            raise ValueError(f"the folder {self.root} has no split {name!r}; it has {', '.join(SPLITS)}")
        return [picture for picture in self.pictures if picture.split in wanted]

    def problems_by_kind(self) -> dict[str, list[Problem]]:
        """The problems of each kind, in the order of their names."""
        kinds: dict[str, list[Problem]] = {}
        for problem in self.problems:
            kinds.setdefault(problem.kind, []).append(problem)
        return kinds

    def summary(self, names: int = 3) -> str:
        """One line on what is used and what was left out, with a few names a kind."""
        kinds = self.problems_by_kind()
        used = f"{self.root}: {len(self.pictures)} captioned pictures"
        if not kinds:
            return used
        parts = []
        for kind, found in kinds.items():
            more = f" and {len(found) - names} more" if len(found) > names else ""
            shown = ", ".join(problem.name for problem in found[:names])
            parts.append(f"{len(found)} {kind} ({shown}{more})")
        return f"{used}; left out: {'; '.join(parts)}. `dalle2 data check {self.root}` says more"


def split_of(name: str) -> str:
    """The split of a picture by its name in the folder, with / between folders."""
    number = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") % 20
    return "test" if number == 0 else "validation" if number == 1 else "train"


def read_folder(root: str | Path, cache_dir: str | Path | None = None) -> Folder:
    """Reads every caption and decodes every picture once.

    cache_dir: keeps there what was found of each file, so that only new and changed files are decoded the next time.

    Raises:
        ValueError: if `root` is no folder, has two metadata files or one that cannot be read as such, or holds no
            captioned picture.
    """
    root = Path(root).expanduser()
    if not root.is_dir():
        raise ValueError(f"there is no folder {root}; name one with pictures and captions")
    problems: list[Problem] = []
    files = _files(root, problems)
    captions = _captions(root, files, problems)
    known, found = _read_cache(root, cache_dir), {}
    pictures = []
    for name, path in files.items():
        facts = found[name] = _facts(path, known.get(name))
        if "problem" in facts:
            problems.append(Problem(name, "not usable as pictures", facts["problem"]))
        elif not captions.get(name):
            if not any(problem.name in (name, _text_name(name)) for problem in problems):
                text = _text_name(name)
                problems.append(Problem(name, "without a caption", f"there is no {text} and no line of metadata"))
        else:
            size = {key: facts[key] for key in ("width", "height", "mode")}
            pictures.append(Picture(name, tuple(dict.fromkeys(captions[name])), **size))
    if found != known:
        _write_cache(root, cache_dir, found)
    result = Folder(root, tuple(pictures), tuple(sorted(problems, key=lambda problem: (problem.kind, problem.name))))
    if not pictures:
        raise ValueError(
            f"no captioned picture is left in {root}: it has {len(files)} picture files "
            f"({', '.join(extension[1:] for extension in EXTENSIONS)}) and {len(problems)} problems"
            + (f", the first: {result.problems[0]}" if problems else "")
            + "; put NAME.txt beside NAME.png, or a metadata.jsonl with file_name and text"
        )
    return result


def _files(root: Path, problems: list[Problem]) -> dict[str, Path]:
    """{name: path} of the picture files below `root`, in the order of their names."""
    inside, found = root.resolve(), {}

    def unreadable(error: OSError) -> None:
        name = Path(error.filename).relative_to(root).as_posix()
        problems.append(Problem(name, "unreadable folders", f"it cannot be read ({error.strerror})"))

    for folder, folders, names in os.walk(root, onerror=unreadable):
        for name in list(folders):
            path = Path(folder, name)
            if name.startswith("."):
                folders.remove(name)
            elif path.is_symlink():  # os.walk does not follow it
                reason = "it is a link to a folder, and links to folders are not followed"
                problems.append(Problem(path.relative_to(root).as_posix(), "links", reason))
        for name in names:
            path = Path(folder, name)
            if name.startswith(".") or path.suffix.lower() not in EXTENSIONS:
                continue
            short = path.relative_to(root).as_posix()
            if not path.resolve().is_relative_to(inside):
                problems.append(Problem(short, "links", "it is a link out of the folder"))
            elif not path.is_file():
                problems.append(Problem(short, "links", "it is a link to nothing"))
            else:
                found[short] = path
    return dict(sorted(found.items()))


def _text_name(name: str) -> str:
    return name[: name.rindex(".")] + ".txt"


def _captions(root: Path, files: dict[str, Path], problems: list[Problem]) -> dict[str, list[str]]:
    """{picture name: captions}, from the metadata file and from the text files."""
    present = [name for name in METADATA if (root / name).is_file()]
    if len(present) > 1:
        raise ValueError(f"{root} has both {' and '.join(present)}; keep one of them")
    captions: dict[str, list[str]] = {}
    for place, name, texts in _metadata(root / present[0], problems) if present else ():
        name = os.path.normpath(name).replace(os.sep, "/")
        said = [text.strip() for text in texts if text.strip()]
        if name.startswith(("/", "../")):
            problems.append(Problem(place, "broken lines of metadata", f"{name} lies outside the folder"))
        elif name not in files:
            left_out = any(problem.name == name for problem in problems)
            if not left_out:
                problems.append(Problem(place, "broken lines of metadata", f"there is no picture {name}"))
        elif not said:
            problems.append(Problem(name, "without a caption", f"its text in {place} is empty"))
        else:
            captions.setdefault(name, []).extend(said)
    inside = root.resolve()
    for name in files:
        path = root / _text_name(name)
        if name in captions or not os.path.lexists(path):
            continue
        text = _text_name(name)
        if not path.resolve().is_relative_to(inside):
            problems.append(Problem(text, "links", "it is a link out of the folder"))
            continue
        try:
            lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines()]
        except UnicodeDecodeError:
            problems.append(Problem(text, "captions that are not UTF-8", "save it as UTF-8"))
            continue
        except OSError as error:
            problems.append(Problem(text, "without a caption", f"it cannot be read ({error.strerror})"))
            continue
        if not any(lines):
            problems.append(Problem(text, "without a caption", "it is empty"))
        captions[name] = [line for line in lines if line]
    return captions


def _metadata(path: Path, problems: list[Problem]) -> Iterator[tuple[str, str, list[str]]]:
    """(where, file name, captions) of each line of a metadata file that says both."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise ValueError(f"{path} is not UTF-8; save it as UTF-8") from None
    if path.suffix == ".csv":
        rows = csv.DictReader(io.StringIO(text, newline=""))
        missing = {"file_name", "text"} - set(rows.fieldnames or ())
        if missing:
            raise ValueError(
                f"{path} has no column {' and no column '.join(sorted(missing))}; its first line names them"
            )
        lines = ((rows.line_num, row) for row in rows)
    else:
        lines = ((number, line) for number, line in enumerate(text.splitlines(), 1) if line.strip())
    for number, row in lines:
        place = f"{path.name} line {number}"
        if isinstance(row, str):
            try:
                row = json.loads(row)
            except ValueError as error:
                problems.append(Problem(place, "broken lines of metadata", f"it is not JSON ({error})"))
                continue
        name, texts = (row.get("file_name"), row.get("text")) if isinstance(row, dict) else (None, None)
        texts = [texts] if isinstance(texts, str) else texts
        if not isinstance(name, str) or not name:
            problems.append(Problem(place, "broken lines of metadata", "it names no file_name"))
        elif not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
            problems.append(Problem(place, "broken lines of metadata", f"its text for {name} is no text"))
        else:
            yield place, name, texts


def _facts(path: Path, known: dict | None) -> dict:
    """What the file is: size, mode and the stamp it was read at; or the problem with it."""
    status = path.stat()
    stamp = [status.st_size, status.st_mtime_ns]
    if known is not None and known.get("stamp") == stamp:
        return known
    try:
        picture, mode = open_picture(str(path))
    except PictureError as error:
        return {"stamp": stamp, "problem": str(error)}
    if min(picture.size) < SMALLEST_SIDE:
        size = f"{picture.width} x {picture.height}"
        return {"stamp": stamp, "problem": f"it has {size} pixels, and a side below {SMALLEST_SIDE}"}
    return {"stamp": stamp, "width": picture.width, "height": picture.height, "mode": mode}


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
    path = _cache_path(root, cache_dir)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(f".{os.getpid()}.partial")
    partial.write_text(json.dumps(found), encoding="utf-8")
    partial.replace(path)


class FolderRecords:
    """The pictures of one split as records with random access, as a TFDS data source has them."""

    def __init__(self, root: Path, pictures: Sequence[Picture]):
        self._root, self._pictures = root, list(pictures)

    def __len__(self) -> int:
        return len(self._pictures)

    def __getitems__(self, indices: Sequence[int]) -> list[dict]:
        chosen = [self._pictures[i] for i in indices]
        return [{"image": (self._root / one.name).read_bytes(), "captions": list(one.captions)} for one in chosen]
