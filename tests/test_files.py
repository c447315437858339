"""Files are read with a bound and written whole or not at all, and what is there is not lost."""

import os
from pathlib import Path

import numpy as np
import pytest

from dalle2_jax.cli.output import write_image
from dalle2_jax.data.sources.build import _alone
from dalle2_jax.errors import InputError
from dalle2_jax.files import folder_written_whole, numbered, read_bytes, write_atomically, written_whole
from dalle2_jax.images.files import save_png

BLACK, WHITE = np.zeros((4, 4, 3), np.uint8), np.full((4, 4, 3), 255, np.uint8)


def test_reading_has_a_bound(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"x" * 100)
    assert read_bytes(path, 100) == b"x" * 100
    (tmp_path / "link").symlink_to(path)
    assert read_bytes(tmp_path / "link", 100) == b"x" * 100
    os.mkfifo(tmp_path / "pipe")
    for wrong, sentence in (
        (path, "has more than"),
        (Path("/dev/zero"), "is no file"),
        (tmp_path / "pipe", "is no file"),
    ):
        with pytest.raises(InputError, match=sentence):
            read_bytes(wrong, 99)
    for wrong in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(OSError):
            read_bytes(wrong, 99)


@pytest.mark.parametrize("write", [lambda path: save_png(path, WHITE), lambda path: write_atomically(path, "new")])
def test_no_link_is_followed(tmp_path, write):
    """Neither at the file's name, nor at names that temporary files have had."""
    mine = tmp_path / "mine.txt"
    mine.write_text("kept")
    target = tmp_path / "out" / "image.png"
    target.parent.mkdir()
    for name in ("image.png", "image.png.partial", ".image.png.tmp"):
        (target.parent / name).symlink_to(mine)
    write(target)
    assert mine.read_text() == "kept" and target.is_file() and not target.is_symlink()
    assert sorted(path.name for path in target.parent.iterdir()) == [".image.png.tmp", "image.png", "image.png.partial"]


def test_what_fails_changes_nothing(tmp_path):
    path = tmp_path / "file"
    path.write_text("kept")
    with pytest.raises(ZeroDivisionError), written_whole(path) as file:
        file.write(b"half")
        raise ZeroDivisionError
    assert path.read_text() == "kept" and os.listdir(tmp_path) == ["file"]
    with written_whole(path) as file:
        file.write(b"new")
    assert path.read_text() == "new"
    (tmp_path / "plain").touch()
    assert path.stat().st_mode == (tmp_path / "plain").stat().st_mode
    long = tmp_path / ("ä" * 120)  # as many bytes as a name may have, nearly
    write_atomically(long, "x")
    assert long.read_text() == "x"


def test_a_folder_is_whole_or_not_there(tmp_path):
    folder, partial = tmp_path / "out", tmp_path / "out.partial"
    with folder_written_whole(folder) as whole:
        (whole / "a").write_text("x")
        assert whole == partial and not folder.exists()
    assert os.listdir(tmp_path) == ["out"] and (folder / "a").read_text() == "x"
    with pytest.raises(InputError, match="out exists already"), folder_written_whole(folder):
        pass
    other = tmp_path / "other"
    with pytest.raises(ZeroDivisionError), folder_written_whole(other):
        raise ZeroDivisionError
    assert os.listdir(tmp_path) == ["out"]
    # What a kill has left, or another process is writing.
    (tmp_path / "other.partial").mkdir()
    (tmp_path / "other.partial" / "mine").touch()
    with pytest.raises(InputError, match="other.partial is there: a command is writing it, or was killed"):
        with folder_written_whole(other):
            pass
    assert (tmp_path / "other.partial" / "mine").exists() and not other.exists()
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    with pytest.raises(InputError, match="dangling exists already"), folder_written_whole(tmp_path / "dangling"):
        pass


def test_an_image_of_other_settings_is_kept_beside(tmp_path, capsys):
    path = tmp_path / "image.png"
    assert write_image(path, BLACK, {"seed": "0"}) == path
    assert write_image(path, BLACK, {"seed": "0"}) == path and os.listdir(tmp_path) == ["image.png"]
    second = write_image(path, WHITE, {"seed": "0"})
    assert second == tmp_path / "image-2.png" == write_image(path, WHITE, {"seed": "0"})
    assert capsys.readouterr().err == ""
    before = path.read_bytes()
    assert write_image(path, WHITE, {"seed": "0"}, True) == path and path.read_bytes() != before
    assert capsys.readouterr().err == f"dalle2: {path} was there, and is replaced\n"
    names = numbered(Path("a.b/c.d"))
    assert [str(next(names)) for _ in range(3)] == ["a.b/c.d", "a.b/c-2.d", "a.b/c-3.d"]


def test_a_lock_empties_no_file(tmp_path):
    mine = tmp_path / "mine.txt"
    mine.write_text("kept")
    (tmp_path / ".prepare.lock").symlink_to(mine)
    with pytest.raises(OSError) as raised, _alone(tmp_path):
        pass
    assert raised.value.filename and mine.read_text() == "kept"
    (tmp_path / ".prepare.lock").unlink()
    with _alone(tmp_path):
        pass
