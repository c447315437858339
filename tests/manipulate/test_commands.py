"""The commands over latents: what they write, and one sentence and code 2 for what cannot be."""

import json
import shutil

import numpy as np
import pytest
from PIL import Image

from dalle2_jax import DALLE2, cli
from dalle2_jax.cli.images import read_images
from dalle2_jax.images.resize import squares
from dalle2_jax.manipulate.series import Series
from tests.cascade import FINAL_SIZE

FAST = ("--steps", "3", "--batch-size", "8")


@pytest.fixture(scope="module")
def run(tiny) -> str:
    return str(tiny.run_dir)


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Files of every kind, by name: with alpha, CMYK, turned by EXIF data, animated, of one pixel, enormous."""
    folder = tmp_path_factory.mktemp("photos")
    random = np.random.default_rng(0).integers(0, 256, (24, 30, 3), np.uint8)
    photo = Image.fromarray(random)
    photo.save(folder / "plain.png")
    Image.fromarray(np.dstack([random, np.full((24, 30), 90, np.uint8)])).save(folder / "alpha.png")
    photo.convert("CMYK").save(folder / "cmyk.jpg", quality=100)
    exif = Image.Exif()
    exif[0x0112] = 3
    photo.transpose(Image.Transpose.ROTATE_180).save(folder / "turned.png", exif=exif)
    frames = [photo.convert("P"), photo.rotate(90, expand=False).convert("P")]
    frames[0].save(folder / "animated.gif", save_all=True, append_images=frames[1:])
    Image.new("RGB", (1, 1)).save(folder / "pixel.png")
    Image.new("1", (12_000, 10_000)).save(folder / "enormous.png")
    return folder


@pytest.fixture(autouse=True)
def loaded_once(monkeypatch, run, model):
    load = DALLE2.load
    monkeypatch.setattr(DALLE2, "load", lambda path, **how: model if str(path) == run else load(path, **how))


def written(capsys) -> list[str]:
    captured = capsys.readouterr()
    assert captured.err == ""
    return captured.out.split("\n")[:-1]


def pixels_of(path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image)


def test_images_of_any_kind_are_reconstructed(run, photos, tmp_path, capsys):
    names = ["plain.png", "turned.png", "alpha.png", "cmyk.jpg", "animated.gif"]
    out = tmp_path / "out"
    assert cli.main(["reconstruct", run, *(str(photos / name) for name in names), *FAST, "--out", str(out)]) == 0
    paths = written(capsys)
    assert [path.rsplit("/", 1)[1] for path in paths] == [
        f"{number:03d}_{name.split('.')[0]}_0.png" for number, name in enumerate(names)
    ]
    with Image.open(paths[1]) as image:
        assert image.size == (FINAL_SIZE, FINAL_SIZE)
        assert image.text["label"] == "turned" and image.text["steps"] == "3" and image.text["seed"] == "0"
        assert image.text["sources"].split("\n") == names
    # Turned as its EXIF data say, it is the plain one (to the rounding of another row of the batch).
    assert np.abs(pixels_of(paths[0]).astype(int) - pixels_of(paths[1])).max() <= 1
    assert (pixels_of(paths[0]) != pixels_of(paths[2])).any()


def test_an_interpolation_has_the_reconstructions_at_its_ends(run, photos, tmp_path, capsys):
    two = [str(photos / "plain.png"), str(photos / "alpha.png")]
    assert cli.main(["reconstruct", run, *two, *FAST, "--out", str(tmp_path / "ends")]) == 0
    ends = written(capsys)
    assert cli.main(["interpolate", run, *two, *FAST, "--frames", "4", "--out", str(tmp_path / "frames")]) == 0
    frames = written(capsys)
    assert len(frames) == 4 and frames[1].endswith("001_theta_0_33_0.png")
    for end, frame in zip(ends, (frames[0], frames[-1]), strict=True):
        np.testing.assert_array_equal(pixels_of(end), pixels_of(frame))
    sheet = tmp_path / "grid.png"
    arguments = ["interpolate", run, *two, *two, *FAST, "--frames", "3", "--grid", "--out", str(sheet)]
    assert cli.main(arguments) == 0
    with Image.open(written(capsys)[0]) as image:
        assert image.text["labels"].split("\n")[4] == "down 0.50, right 0.50" and image.text["noise"] == "interpolated"
        assert image.width > 3 * 96 and image.height > 3 * 96


def test_variations_of_the_latent(run, photos, tmp_path, capsys):
    plain = str(photos / "plain.png")
    given, shown = squares(read_images([plain]), FINAL_SIZE)[0], {}
    for share in ("content", "semantics"):
        out = str(tmp_path / f"{share}.png")
        assert cli.main(["vary", run, plain, *FAST, "--share", share, "--count", "2", "--grid", "--out", out]) == 0
        first, *shown[share] = cells_of(written(capsys)[0], 3)
        np.testing.assert_array_equal(first, given)
    assert len({image.tobytes() for images in shown.values() for image in images}) == 4


def cells_of(path, columns: int) -> list[np.ndarray]:
    """The images of a sheet's first row, at the size at which they were sampled."""
    sheet, zoom = pixels_of(path), 96 // FINAL_SIZE
    lefts = (6 + column * (96 + 6) for column in range(columns))
    return [sheet[6 + zoom // 2 : 6 + 96 : zoom, left + zoom // 2 : left + 96 : zoom] for left in lefts]


@pytest.fixture
def asked(monkeypatch):
    """Arguments of `edit` and `probe`, which then return plain images."""
    calls = []

    def instead(name, count):
        def use(model, key, *arguments, **settings):
            calls.append((name, arguments, settings))
            return Series(np.zeros((count, 4, 4, 3), np.uint8), tuple(f"{name} {n}" for n in range(count)), 2)

        return use

    monkeypatch.setattr("dalle2_jax.manipulate.edit", instead("edit", 2))
    monkeypatch.setattr("dalle2_jax.manipulate.probe", instead("probe", 4))
    return calls


def test_edit_and_probe_pass_on_what_they_are_told(run, photos, tmp_path, capsys, asked):
    plain = str(photos / "plain.png")
    texts = ["--to", "a large blue cross", "--from", "a circle", "--theta", "0.4", "--frames", "3"]
    out = str(tmp_path / "edits")
    assert cli.main(["edit", run, plain, *texts, *FAST, "--guidance-scale", "2", "--out", out]) == 0
    name, (latent, to, origin, thetas), settings = asked[0]
    assert name == "edit" and (to, origin) == ("a large blue cross", "a circle") and latent.steps == "3"
    np.testing.assert_allclose(thetas, [0, 0.2, 0.4])
    assert settings["decoder"] == {"guidance_scale": 2.0} and settings["batch_size"] == 8
    with Image.open(written(capsys)[1]) as image:
        assert image.text["to"] == "a large blue cross" and image.text["from"] == "a circle"
    sheet = str(tmp_path / "probe.png")
    arguments = ["probe", run, plain, plain, "--fit", str(photos), "--fit-count", "3"]
    assert cli.main([*arguments, "--dimensions", "1,2", "--grid", "--out", sheet, "--steps", "3"]) == 0
    name, (images, pca, dimensions), settings = asked[1]
    assert name == "probe" and len(images) == 2 and dimensions == (1, 2) and settings["steps"] == "3"
    assert len(pca) == 2  # of three images: alpha, animated, cmyk
    with Image.open(written(capsys)[0]) as image:
        assert image.text["labels"].split("\n") == [f"plain, probe {number}" for number in range(4)]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["reconstruct", "RUN", "pixel.png"], "image 1 has 1 x 1 pixels; give one of at least 8 x 8"),
        (["reconstruct", "RUN", "enormous.png"], "it has 12000 x 10000 pixels, more than 100,000,000"),
        (["reconstruct", "RUN", "none.png"], "No such file"),
        (["reconstruct", "RUN", "plain.png", "--caption", "a", "--caption", "b"], "2 captions were given for 1 images"),
        (["reconstruct", "RUN", "plain.png", "--sampler", "ddpm"], "--sampler is ddpm; the decoder is sampled by ddim"),
        (["reconstruct", "RUN", "plain.png", "--eta", "1"], "--eta has no effect here"),
        (["reconstruct", "RUN", "plain.png", "--steps", "prior=3"], "no prior is at work here; leave prior=3 out"),
        (["reconstruct", "RUN", "plain.png", "plain.png", "--out", "a.png"], "a.png is one file but 2 images"),
        (["interpolate", "RUN", "plain.png"], "1 images were given; name two to interpolate, or four for a grid"),
        (["interpolate", "RUN", "plain.png", "plain.png", "--frames", "1"], "--frames is 1; it must be 2 or more"),
        (["edit", "RUN", "plain.png", "--to", "a cross", "--theta", "1.5"], "--theta is 1.5; it must lie in 0 to 1"),
        (["edit", "RUN", "plain.png", "--to", "a cross", "--frames", "0"], "--frames is 0; it must be 1 or more"),
        (["probe", "RUN", "plain.png", "--dimensions", "2,x"], "--dimensions takes numbers with commas between"),
        (["probe", "RUN", "plain.png", "--dimensions", "9"], "9 dimensions were asked for; there are 8 principal"),
        (["probe", "RUN", "plain.png", "--fit", "nowhere"], "there is no image in nowhere"),
        (["vary", "RUN", "plain.png", "--share", "content", "--stages"], "--stages and --share do not go together"),
        (["vary", "RUN", "plain.png", "--refinements", "1"], "--refinements is of latents; add --share content"),
        (["evaluate", "RUN", "--latent", "--split", "train"], "--split has no effect with --latent; leave it out"),
        (
            ["evaluate", "EMOJI", "--latent"],
            "captioned_shapes/one_object, and this run was trained on emoji",
        ),
    ],
)
def test_bad_input_is_one_sentence(run, photos, tmp_path, monkeypatch, capsys, arguments, sentence):
    monkeypatch.chdir(tmp_path)
    places = {"RUN": run, "none.png": "none.png", "EMOJI": "emoji"}
    if "EMOJI" in arguments:
        shutil.copytree(run, tmp_path / "emoji")
        path = tmp_path / "emoji" / "clip" / "stage.json"
        info = json.loads(path.read_text())
        info["data"]["fields"] |= {"name": "emoji", "config": None}
        path.write_text(json.dumps(info))
    files = {path.name: str(path) for path in photos.iterdir()}
    assert cli.main([{**files, **places}.get(argument, argument) for argument in arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1 and sentence in captured.err
    assert {path.name for path in tmp_path.iterdir()} <= {"emoji"} and not (tmp_path / "emoji" / "latent.json").exists()
