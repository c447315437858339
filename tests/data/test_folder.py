"""A folder of people's own images: what is read, what is converted, and every defect by its name."""

import io
import json
import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dalle2_jax.data import Data, all_captions, evaluation_examples, open_source
from dalle2_jax.data.sources.folder import SPLITS, read_folder, split_of
from dalle2_jax.images.read import MOST_PIXELS, read_image


def blank_image(color=(200, 30, 30), size=(24, 20), mode="RGB") -> Image.Image:
    return Image.new(mode, size, color)


def add(folder: Path, name: str, caption: str | bytes | None = "a thing", image: Image.Image | None = None, **options):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    (image or blank_image()).save(path, **options)
    if caption is not None:
        text = caption if isinstance(caption, bytes) else caption.encode()
        path.with_suffix(".txt").write_bytes(text)
    return path


def enormous(path: Path, side: int) -> None:
    """A PNG that says it has side x side pixels, and holds none of them."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")))


def test_captions_beside_images(tmp_path):
    add(tmp_path, "b.png", "a red thing\n\n  something red \n")
    add(tmp_path, "within/a.JPG", "\ufeffein rotes Ding, 紅")
    (tmp_path / "notes.md").write_text("no image")
    (tmp_path / ".hidden.png").write_text("neither")
    folder = read_folder(tmp_path)
    assert [p.name for p in folder.images] == ["b.png", "within/a.JPG"] and not folder.problems
    assert folder.images[0].captions == ("a red thing", "something red")
    assert folder.images[1].captions == ("ein rotes Ding, 紅",)
    assert (folder.images[0].width, folder.images[0].height, folder.images[0].mode) == (24, 20, "RGB")
    assert folder.summary() == f"{tmp_path}: 2 captioned images"


@pytest.mark.parametrize("name", ["metadata.jsonl", "metadata.csv"])
def test_captions_in_one_file(tmp_path, name):
    for number in range(3):
        add(tmp_path, f"p/{number}.png", None)
    add(tmp_path, "q.png", "beside it")
    if name.endswith("jsonl"):
        rows = [
            {"file_name": "p/0.png", "text": "first, with a comma"},
            {"file_name": "./p/1.png", "text": ["second", "number two"]},
            {"file_name": "p/2.png", "text": "dritte: größer"},
        ]
        text = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
        second = ("second", "number two")
    else:
        text = 'file_name,other,text\np/0.png,1,"first, with a comma"\np/1.png,2,second\np/2.png,3,dritte: größer\n'
        second = ("second",)
    (tmp_path / name).write_text(text, encoding="utf-8")
    found = {p.name: p.captions for p in read_folder(tmp_path).images}
    assert found == {
        "p/0.png": ("first, with a comma",),
        "p/1.png": second,
        "p/2.png": ("dritte: größer",),
        "q.png": ("beside it",),
    }


def test_every_defect_is_named_and_nothing_else_is_lost(tmp_path):
    root, outside = tmp_path / "images", tmp_path / "outside"
    outside.mkdir()
    good = [add(root, f"good_{number}.png", f"thing number {number}").name for number in range(4)]
    add(outside, "far.png")
    (root / "cut.png").write_bytes(_bytes(blank_image(size=(64, 64)), noisy=True)[:-400])
    (root / "cut.txt").write_text("cut short")
    (root / "text.png").write_text("this is no image")
    (root / "text.txt").write_text("no image")
    (root / "nothing.jpg").write_bytes(b"")
    enormous(root / "enormous.png", 30_000)
    enormous(root / "large.png", 12_000)
    add(root, "narrow.png", "narrow", blank_image(size=(3, 900)))
    add(root, "captionless.png", None)
    add(root, "empty.png", " \n ")
    add(root, "latin.png", "grün".encode("latin-1"))
    (root / "link_out.png").symlink_to(outside / "far.png")
    (root / "dangling.png").symlink_to(root / "not_there.png")
    (root / "linked").symlink_to(outside)
    (root / "round.png").symlink_to(root / "round.png")
    add(root, "round_caption.png", None)
    (root / "round_caption.txt").symlink_to(root / "round_caption.txt")
    Path(os.fsdecode(os.fsencode(root) + b"/caf\xe9.png")).write_bytes((root / good[0]).read_bytes())
    (root / "phone.heic").write_bytes(b"\0\0\0\x18ftypheic")
    add(root, "caption_out.png", None)
    (root / "caption_out.txt").symlink_to(outside / "far.txt")
    lines = [
        '{"file_name": "good_0.png", "text": "from the metadata"}',
        '{"file_name": "good_1.png", "text": ',
        '{"text": "of nothing"}',
        '{"file_name": "missing.png", "text": "a"}',
        '{"file_name": "../outside/far.png", "text": "a"}',
        '{"file_name": "good_2.png", "text": 7}',
        '{"file_name": "good_3.png", "text": "  "}',
        "[1, 2]",
        '{"file_name": "good_0.png", "text": "half an emoji \\ud83d"}',
        '{"file_name": "half \\ud83d.png", "text": 7}',
    ]
    (root / "metadata.jsonl").write_text("\n".join(lines))
    folder = read_folder(root)
    # What is wrong with a line of metadata costs that line alone: the caption beside the image still counts.
    assert [p.name for p in folder.images] == good
    assert folder.images[0].captions == ("from the metadata",)
    assert folder.images[1].captions == ("thing number 1",)
    said = {problem.name: (problem.kind, problem.reason) for problem in folder.problems}
    expected = {
        "cut.png": ("not usable as images", "damaged or cut short"),
        "text.png": ("not usable as images", "not an image"),
        "nothing.jpg": ("not usable as images", "not an image"),
        "enormous.png": ("not usable as images", f"more than {MOST_PIXELS:,}"),
        "large.png": ("not usable as images", f"12000 x 12000 pixels, more than {MOST_PIXELS:,}"),
        "narrow.png": ("not usable as images", "3 x 900 pixels, and a side below 16"),
        "captionless.png": ("without a caption", "there is no captionless.txt and no text in a metadata file"),
        "empty.txt": ("without a caption", "it is empty"),
        "latin.txt": ("captions that are not UTF-8", "save it as UTF-8"),
        "link_out.png": ("links", "a link out of the folder"),
        "dangling.png": ("links", "a link to nothing"),
        "linked": ("links", "links to folders are not followed"),
        "caption_out.txt": ("links", "a link out of the folder"),
        "metadata.jsonl line 2": ("broken lines of metadata", "it is not JSON"),
        "metadata.jsonl line 3": ("broken lines of metadata", "it names no file_name"),
        "metadata.jsonl line 4": ("broken lines of metadata", "there is no image missing.png"),
        "metadata.jsonl line 5": ("broken lines of metadata", "../outside/far.png lies outside the folder"),
        "metadata.jsonl line 6": ("broken lines of metadata", "its text for good_2.png is no text"),
        "metadata.jsonl line 7": ("broken lines of metadata", "its text for good_3.png is empty"),
        "metadata.jsonl line 8": ("broken lines of metadata", "it names no file_name"),
        "metadata.jsonl line 9": ("broken lines of metadata", "half a character"),
        "metadata.jsonl line 10": ("broken lines of metadata", "its text for half \\ud83d.png is no text"),
        "round.png": ("links", "a link to itself"),
        "round_caption.txt": ("links", "a link to itself"),
        "caf\\udce9.png": ("names that are not UTF-8", "rename it"),
        "phone.heic": ("not usable as images", "not an image that Pillow can read"),
    }
    assert said.keys() == expected.keys()
    for name, (kind, reason) in expected.items():
        assert said[name][0] == kind and reason in said[name][1], (name, said[name])
    summary = folder.summary()
    assert "4 captioned images; left out: " in summary and "dalle2 data check" in summary
    assert "7 not usable as images (cut.png, enormous.png, large.png and 4 more)" in summary


def test_captions_that_no_image_has_are_named(tmp_path):
    add(tmp_path, "a.png", "a\u2028thing, and\x0call of it\r\nanother thing\r\n")
    add(tmp_path, "cut.png", "cut")
    (tmp_path / "cut.png").write_bytes(b"")
    (tmp_path / "b.txt").write_text("a lost caption")
    folder = read_folder(tmp_path)
    # Lines end where editors and JSON say, not at every character that Unicode calls a separator.
    assert folder.images[0].captions == ("a\u2028thing, and\x0call of it", "another thing")
    assert {problem.name: problem.kind for problem in folder.problems} == {
        "b.txt": "captions without an image",
        "cut.png": "not usable as images",
    }


def test_a_table_with_commas_and_quotes_where_they_do_not_belong(tmp_path):
    for name in "abc":
        add(tmp_path, f"{name}.png", None)
    table = tmp_path / "metadata.csv"
    table.write_text("file_name,text\na.png,a red, round apple\nb.png,blue\nc.png,green\n")
    folder = read_folder(tmp_path)
    assert [image.name for image in folder.images] == ["b.png", "c.png"]
    said = {problem.name: problem.reason for problem in folder.problems}
    assert "more fields than the first line; put its text in quotes" in said["metadata.csv line 2"]
    for quoted in ('a.png,"a red\nb.png,blue\nc.png,green\n', 'a.png,"a red\n' + "b.png,blue\n" * 20_000):
        table.write_text("file_name,text\n" + quoted)
        with pytest.raises(ValueError, match="metadata.csv cannot be read up to line .*; mend its quotes"):
            read_folder(tmp_path)


def test_broken_exif_data_cost_the_turning_alone(tmp_path):
    # Orientation 6, and a resolution that is text where a number is due: Pillow reads it and cannot write it again.
    entries = struct.pack("<HHII", 0x0112, 3, 1, 6) + struct.pack("<HHI4s", 0x011A, 2, 4, b"abc\0")
    exif = b"Exif\0\0II*\0" + struct.pack("<IH", 8, 2) + entries + struct.pack("<I", 0)
    Image.fromarray(_gradient()).save(tmp_path / "photo.jpg", exif=exif)
    add(tmp_path, "other.png")
    (tmp_path / "photo.txt").write_text("a photo")
    folder = read_folder(tmp_path)
    assert [(p.name, p.width, p.height) for p in folder.images] == [("other.png", 24, 20), ("photo.jpg", 20, 30)]
    assert not folder.problems


def _bytes(image: Image.Image, noisy: bool = False, **options) -> bytes:
    if noisy:
        image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3)).astype(np.uint8))
    file = io.BytesIO()
    image.save(file, "PNG", **options)
    return file.getvalue()


def _gradient(height=20, width=30) -> np.ndarray:
    rows, columns = np.mgrid[:height, :width]
    return np.stack([rows * 10, columns * 8, 0 * rows + 60], axis=-1).astype(np.uint8)


def _file(image: Image.Image, form: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def test_modes_are_converted_as_a_viewer_shows_them():
    pixels = _gradient()
    square = pixels[:, 5:25]
    rgb = Image.fromarray(pixels)
    np.testing.assert_array_equal(read_image(_file(rgb, "PNG")), square)
    gray = read_image(_file(rgb.convert("L"), "PNG"))
    np.testing.assert_array_equal(gray, np.asarray(rgb.convert("L"))[:, 5:25, None].repeat(3, -1))
    for mode in ("1", "P", "CMYK"):
        form = "TIFF" if mode == "CMYK" else "PNG"
        converted = rgb.convert(mode)
        np.testing.assert_array_equal(read_image(_file(converted, form)), np.asarray(converted.convert("RGB"))[:, 5:25])
    deep = Image.fromarray(np.asarray(rgb.convert("L")).astype(np.uint16) * 257)
    np.testing.assert_array_equal(read_image(_file(deep, "PNG")), gray)


def test_what_is_transparent_turns_white():
    pixels = np.dstack([_gradient(20, 20), np.full((20, 20), 255, np.uint8)])
    pixels[:10, :, 3] = 0
    found = read_image(_file(Image.fromarray(pixels), "PNG"))
    assert (found[:10] == 255).all() and (found[10:] == pixels[10:, :, :3]).all()
    palette = Image.fromarray(_gradient(20, 20)).quantize(4)
    transparent = int(np.asarray(palette)[0, 0])
    found = read_image(_file(palette, "PNG", transparency=transparent))
    assert (found[np.asarray(palette) == transparent] == 255).all()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_images_are_turned_as_their_exif_data_say(orientation):
    """Where the first row and the first column of the file belong, by the EXIF standard."""
    shown = np.zeros((32, 32, 3), np.uint8)
    shown[:16, :16], shown[:16, 16:], shown[16:, :16] = (255, 0, 0), (0, 255, 0), (0, 0, 255)
    stored = {
        1: shown,
        2: shown[:, ::-1],
        3: shown[::-1, ::-1],
        4: shown[::-1],
        5: shown.transpose(1, 0, 2),
        6: np.rot90(shown, 1),
        7: shown[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(shown, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    found = read_image(_file(Image.fromarray(np.ascontiguousarray(stored)), "PNG", exif=exif))
    np.testing.assert_array_equal(found, shown)


def test_splits_are_stable_and_of_the_right_size(tmp_path):
    names = [f"image_{number}.png" for number in range(4000)]
    share = {split: sum(split_of(name) == split for name in names) / len(names) for split in SPLITS}
    assert share == pytest.approx({"train": 0.9, "validation": 0.05, "test": 0.05}, abs=0.015)
    # Written down: an image must not change sides when the code does.
    assert [split_of(name) for name in ("a.png", "b/c.jpg", "image_10.png")] == ["train", "train", "test"]


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    folder = tmp_path_factory.mktemp("many")
    for number in range(60):
        shade = (4 * number, 255 - 4 * number, 90)
        add(folder, f"p{number:02d}.png", f"shade {number}\na shade", blank_image(shade, (20 + number % 7, 24)))
    return folder


def test_a_folder_is_data_like_any_other(many, tmp_path):
    data = Data(name="folder", folder=str(many), data_dir=str(tmp_path), image_size=16)
    sizes = {split: len(open_source(data, split)) for split in SPLITS}
    assert len(open_source(data, "validation+test")) == sizes["validation"] + sizes["test"]
    assert sum(sizes.values()) == 60 and min(sizes.values()) >= 1
    source = open_source(data, "train")
    assert source.notice == f"{many}: 60 captioned images"
    assert source.images().shape == (sizes["train"], 16, 16, 3)
    captions = all_captions(data, "train")
    assert len(captions) == 2 * sizes["train"] and captions.count("a shade") == sizes["train"]
    examples = evaluation_examples(data, "test", 100)
    for pixels, caption in zip(examples.images, examples.captions, strict=True):
        number = int(caption.removeprefix("shade "))
        np.testing.assert_array_equal(pixels[8, 8], [4 * number, 255 - 4 * number, 90])
    with pytest.raises(ValueError, match="no split 'unseen'; it has train, validation, test"):
        open_source(data, "unseen")


def test_only_what_is_new_is_decoded_again(many, tmp_path, monkeypatch):
    from dalle2_jax.data.sources import folder as module

    first = read_folder(many, tmp_path)
    opened = []
    monkeypatch.setattr(module, "open_image", lambda path: opened.append(path) or (blank_image(), "RGB"))
    assert read_folder(many, tmp_path) == first and not opened
    os.utime(many / "p03.png", (1, 1))
    read_folder(many, tmp_path)
    assert [Path(path).name for path in opened] == ["p03.png"]
    cache = next((tmp_path / "folder").iterdir())
    cache.write_text("{ broken")
    read_folder(many, tmp_path)
    assert len(opened) == 61 and json.loads(cache.read_text()).keys() == {p.name for p in first.images}


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda root: None, "no captioned image is left in .*: it has 0 image files"),
        (lambda root: add(root, "a.png", None), "1 problems, the first: a.png: there is no a.txt"),
        (
            lambda root: [(root / name).write_text("") for name in ("metadata.csv", "metadata.jsonl")],
            "keep one of them",
        ),
        (lambda root: (root / "metadata.csv").write_text("file,caption\n"), "no column file_name and no column text"),
        (lambda root: (root / "metadata.jsonl").write_bytes(b"\xff\xfe"), "is not UTF-8"),
    ],
)
def test_nothing_to_train_on_is_refused(tmp_path, make, sentence):
    make(tmp_path)
    with pytest.raises(ValueError, match=sentence):
        read_folder(tmp_path)


def test_what_is_no_folder_is_refused(tmp_path):
    with pytest.raises(ValueError, match="there is no folder"):
        read_folder(tmp_path / "nowhere")
    for fields in ({"name": "folder"}, {"folder": str(tmp_path)}):
        with pytest.raises(ValueError, match="want data.name=folder and data.folder=PATH"):
            open_source(Data(**fields), "train")
