"""Image files: what is inside decides, memory is bounded, threads share it."""

import threading

import numpy as np
import pytest
from PIL import EpsImagePlugin, Image

from dalle2_jax.images import read, resize
from dalle2_jax.images.read import ImageError, open_image, open_square, read_image

EPS = b"""%!PS-Adobe-3.0 EPSF-3.0
%%BoundingBox: 0 0 20 20
%%EndComments
0 0 20 20 rectfill
showpage
%%EOF
"""


@pytest.mark.parametrize("name", ["picture.png", "picture.eps"])
def test_no_other_program_is_run_for_a_file(name, tmp_path, monkeypatch):
    """Pillow opens EPS by Ghostscript, whatever the file is called."""
    started = []
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *_, **__: started.append(1) or Image.new("RGB", (20, 20)))
    (tmp_path / name).write_bytes(EPS)
    for file in (EPS, str(tmp_path / name)):
        with pytest.raises(ImageError, match="not an image that Pillow can read"):
            open_image(file)
    assert not started


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "JPEG2000"])
def test_the_formats_that_are_read(form, tmp_path):
    pixels = np.full((20, 30, 3), (200, 30, 90), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "image", form)
    found = np.asarray(open_image(str(tmp_path / "image"))[0].convert("RGB"), int)
    assert found.shape == (20, 30, 3) and np.abs(found - pixels).max() <= 6


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "LA", "P", "I;16", "F"])
def test_strips_are_the_whole(mode, tmp_path, monkeypatch):
    random = np.random.default_rng(0)
    pixels = random.integers(0, 256, (37, 29, 4)).astype(np.uint8)
    image = Image.fromarray(pixels)
    if mode == "I;16":
        image = Image.fromarray(random.integers(0, 65536, (37, 29)).astype(np.uint16))
    elif mode != "RGBA":
        image = image.convert("RGB" if mode == "P" else mode)
        image = image.quantize(16) if mode == "P" else image
    image.save(tmp_path / "image", "TIFF" if mode == "F" else "PNG")
    whole = read_image(str(tmp_path / "image"))
    assert whole.shape == (29, 29, 3)
    for module in (read, resize):
        monkeypatch.setattr(module, "STRIP", 100)
    np.testing.assert_array_equal(read_image(str(tmp_path / "image")), whole)
    if mode == "RGBA":
        alpha = pixels[4:33, :, 3:].astype(np.float32) / 255
        np.testing.assert_array_equal(whole, np.rint(pixels[4:33, :, :3] * alpha + 255 * (1 - alpha)))


def test_threads_share_a_budget_of_bytes(tmp_path, monkeypatch):
    """Of images of which two would be too many, one is open at a time; small ones are open together."""
    monkeypatch.setattr(read, "_BUDGET", read._Budget(50_000))
    for name, side in (("large", 64), ("small", 16)):
        Image.new("RGBA", (side, side)).save(tmp_path / name, "PNG")
    opened, most, lock = set(), [], threading.Lock()

    def work(name):
        with open_square(str(tmp_path / name)):
            with lock:
                opened.add(threading.get_ident())
                most.append(len(opened))
            wait.wait(0.05)
            with lock:
                opened.discard(threading.get_ident())

    for name, allowed in (("large", 1), ("small", 4)):
        wait = threading.Event()
        most.clear()
        threads = [threading.Thread(target=work, args=[name]) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert len(most) == 4 and (max(most) == 1 if allowed == 1 else max(most) > 1)
    with pytest.raises(ValueError), open_square(str(tmp_path / "large")):
        raise ValueError("of the caller, which is no fault of the image")
    with open_square(str(tmp_path / "large")) as image:  # what was taken is given back
        assert image.size == (64, 64)
