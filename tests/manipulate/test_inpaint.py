"""Inpainting and outpainting by a whole run: known bytes, masks at every size, and one sentence for bad input."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from dalle2_jax import DALLE2, cli
from dalle2_jax.checkpoint.rebuild import to_json
from dalle2_jax.diffusion import Sampling
from dalle2_jax.images.resize import resize
from dalle2_jax.manipulate.canvas import any_in_cells, extended, square_canvas
from dalle2_jax.manipulate.inpaint import inpaint, outpaint
from tests.cascade import DECODER_SIZE, FINAL_SIZE
from tests.weights import folders

KEY = jax.random.key(0)
CAPTION = "a small red circle on a gray background"
FEW = {"prior": {"steps": "2"}, "decoder": {"steps": "3"}, "upsampler": {"steps": "2"}}
WITHOUT_PRIOR = {name: FEW[name] for name in ("decoder", "upsampler")}
JUMPS = {"jump_length": 1, "jump_samples": 2}
RNG = np.random.default_rng(0)
PHOTO = RNG.integers(0, 256, (48, 60, 3), np.uint8)
HOLE = np.zeros((48, 60), bool)
HOLE[10:30, 20:41] = True


@pytest.fixture(scope="module")
def model(tiny) -> DALLE2:
    return DALLE2.load(tiny.run_dir)


def test_cells_that_are_touched():
    """Against a loop over every pixel of a random mask, smaller and larger."""
    masks = RNG.uniform(size=(3, 12, 12)) < 0.06
    for size in (1, 4, 5, 12, 18):
        found, expected = any_in_cells(masks, size), np.zeros((3, size, size), bool)
        cells = np.arange(size)
        for n, y, x in np.argwhere(masks):
            rows, columns = (cells[(cells * 12 < (at + 1) * size) & ((cells + 1) * 12 > at * size)] for at in (y, x))
            expected[np.ix_([n], rows, columns)] = True
        np.testing.assert_array_equal(found, expected)


def test_a_canvas_is_the_central_square_at_the_runs_size():
    canvas = square_canvas(PHOTO, HOLE, 16, 8)
    np.testing.assert_array_equal(canvas.image, PHOTO[:, 6:54].reshape(16, 3, 16, 3, 3).mean((1, 3)).round())
    expected = np.zeros((16, 16), bool)
    expected[3:10, 4:12] = True  # rows 10 to 29 and columns 14 to 34 of the square, in cells of 3
    np.testing.assert_array_equal(canvas.mask, expected)
    gray = np.dstack([PHOTO[..., 0], np.where(HOLE, 0, 255)[:, :, None].astype(np.uint8)])[..., :1]
    np.testing.assert_array_equal(square_canvas(gray, HOLE.astype(np.uint8) * 200, 16, 8).mask, expected)


@pytest.mark.parametrize(
    ("factor", "place", "side", "box"),
    [
        (2.0, (0.5, 0.5), 40, (10, 15, 30, 25)),
        (1.5, (0, 1), 30, (0, 20, 20, 30)),
        (1.0, (0.5, 0.5), 20, (0, 5, 20, 15)),
    ],
)
def test_an_extended_canvas_holds_the_image_where_it_is_placed(factor, place, side, box):
    image = RNG.integers(0, 256, (10, 20, 3), np.uint8)
    canvas, mask = extended(image, factor, place, 64)
    left, top, right, bottom = box
    assert canvas.shape == (side, side, 3) and mask.shape == (side, side)
    np.testing.assert_array_equal(canvas[top:bottom, left:right], image)
    assert not mask[top:bottom, left:right].any() and mask.sum() == side**2 - 200
    assert extended(np.zeros((600, 300, 3), np.uint8), 2.0, place, 64)[0].shape == (512, 512, 3)


def test_what_is_known_comes_out_as_it_went_in(model):
    images, masks = [PHOTO, PHOTO[::-1]], [HOLE, ~HOLE]
    keys = jax.random.split(KEY, 2)
    result = inpaint(model, keys, images, masks, CAPTION, **FEW, **JUMPS)
    squares = np.stack([image[:, 6:54] for image in images])
    np.testing.assert_array_equal(result.original, resize(squares, FINAL_SIZE))
    np.testing.assert_array_equal(result.images[~result.mask], result.original[~result.mask])
    assert (result.images[result.mask] != result.original[result.mask]).mean() > 0.9
    assert result.captions == (CAPTION, CAPTION) and result.images.dtype == np.uint8
    # The decoder keeps what is known at its own size, of which nothing is painted.
    small, painted = result.stages[0], any_in_cells(result.mask, DECODER_SIZE)
    np.testing.assert_array_equal(small[~painted], resize(result.original, DECODER_SIZE)[~painted])
    assert 0.1 < painted[0].mean() < 0.9 and [stage.shape[1] for stage in result.stages] == [DECODER_SIZE, FINAL_SIZE]
    # An image is the same alone, and another one with another key.
    alone = inpaint(model, keys[1:], images[1:], masks[1:], [CAPTION], **FEW, **JUMPS)
    assert np.abs(alone.images[0].astype(int) - result.images[1]).max() <= 1
    # The sheet.
    sheet = np.asarray(result.sheet())
    assert sheet.shape[2] == 3 and sheet.shape[0] > 2 * 96
    np.testing.assert_array_equal(result.marked[~result.mask], result.original[~result.mask])


def test_without_a_caption_the_images_own_embedding_speaks(model):
    found = inpaint(model, KEY, [PHOTO], [HOLE], **WITHOUT_PRIOR, **JUMPS)
    own = np.asarray(model.encode_image(resize(PHOTO[None, :, 6:54], 16)))
    given = inpaint(model, KEY, [PHOTO], [HOLE], image_embeddings=own, **WITHOUT_PRIOR, **JUMPS)
    assert np.abs(found.images.astype(int) - given.images).max() <= 2 and found.captions == ()
    other = inpaint(model, KEY, [PHOTO], [HOLE], image_embeddings=-own, **WITHOUT_PRIOR, **JUMPS)
    assert np.abs(other.stages[0].astype(int) - given.stages[0]).max() > 2


def test_a_decoder_whose_own_sampler_cannot_go_back_is_sampled_by_ddim(model):
    own = Sampling(sampler="dpmpp_2m", steps="3", guidance_scale=1.0)
    record = dataclasses.replace(model.decoder.record, sampling=to_json(own))
    other = dataclasses.replace(model, decoder=dataclasses.replace(model.decoder, record=record))
    upsampler, how = FEW["upsampler"], {"sampler": "ddim", "steps": "3", "guidance_scale": 1.0}
    expected = inpaint(model, KEY, [PHOTO], [HOLE], decoder=how, upsampler=upsampler, **JUMPS)
    found = inpaint(other, KEY, [PHOTO], [HOLE], upsampler=upsampler, **JUMPS)
    np.testing.assert_array_equal(found.images, expected.images)


def test_outpainting_keeps_all_of_the_image(model):
    result = outpaint(model, KEY, [PHOTO], factor=2.0, place=(0, 0.5), **WITHOUT_PRIOR, **JUMPS)
    (left, top, right, bottom), kept = result.boxes[0], ~result.mask[0]
    # 60 x 48 pixels on 120 x 120, at 16: 8 x 6.4, of which whole cells are known.
    assert (left, top, right, bottom) == (0, 5, 8, 11) and kept.sum() == kept[top:bottom, left:right].sum() == 48
    canvas = np.pad(PHOTO, ((36, 36), (0, 60), (0, 0)), mode="edge")
    np.testing.assert_array_equal(result.images[0][kept], resize(canvas[None], FINAL_SIZE)[0][kept])
    assert (result.images[0][~kept] != result.original[0][~kept]).mean() > 0.9


def bad(message, **changes):
    return pytest.param(changes, message, id=message[:24].replace(" ", "-"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        bad("the mask is 60 x 47 pixels and the image 60 x 48; give one of the image's size", masks=[HOLE[1:]]),
        bad("the mask paints nothing of the image's central square, which is all", masks=[HOLE & False]),
        bad("the mask paints all of the image's central square", masks=[HOLE | True]),
        bad("the mask paints nothing; make it white", images=[PHOTO[:, :48]], masks=[HOLE[:, :48] & False]),
        bad("the mask paints all of the image and leaves", images=[PHOTO[:, :48]], masks=[HOLE[:, :48] | True]),
        bad("the image is 9 x 7 pixels, too small to paint in", images=[PHOTO[:7, :9]], masks=[HOLE[:7, :9]]),
        bad("its sides must be at least 8", images=[PHOTO[:7, :9]], masks=[HOLE[:7, :9]]),
        bad("the image of image 1 is 9 x 7", images=[PHOTO, PHOTO[:7, :9]], masks=[HOLE, HOLE[:7, :9]]),
        bad("the image is float64", images=[PHOTO / 255]),
        bad("the mask is float64", masks=[HOLE / 1.0]),
        bad("1 masks were given for 2 images", images=[PHOTO, PHOTO]),
        bad("2 captions were given for 1 images", captions=["a", "b"]),
        bad("2 image embeddings were given for 1 images", image_embeddings=np.zeros((2, 8))),
        bad("jump_samples is 0; it must be a whole number", jump_samples=0),
        bad("no prior is at work without a caption", captions=None, prior={"steps": "2"}),
        bad("batch_size is 0", batch_size=0),
        bad("the sampler dpmpp_2m cannot go back", captions=None, decoder={"sampler": "dpmpp_2m", "steps": "3"}),
        bad("sampling has no field 'stepz'", decoder={"stepz": 3}),
        bad("tile is 3; tiles", upsampler={}, tile=0),
    ],
)
def test_bad_input_is_one_sentence(model, changes, message):
    arguments = {"images": [PHOTO], "masks": [HOLE], "captions": CAPTION, **changes}
    if changes.get("tile") == 0:
        message = "tile is 0; tiles of the stage upsampler must be multiples of"
    with pytest.raises(ValueError) as error:
        inpaint(model, KEY, arguments.pop("images"), arguments.pop("masks"), **arguments)
    assert message in str(error.value) and "\n" not in str(error.value) and not str(error.value).endswith(".")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"factor": 0.5}, "factor is 0.5; it must lie in 1 to 8"),
        ({"factor": 9}, "factor is 9; it must lie in 1 to 8"),
        ({"place": (0.5, 2)}, "place is (0.5, 2); it must be two shares"),
        ({"factor": 1.0}, "the image fills its canvas and leaves nothing to paint; give a factor above 1"),
    ],
)
def test_canvases_that_there_are_not(model, changes, message):
    with pytest.raises(ValueError) as error:
        outpaint(model, KEY, [PHOTO[:, :48]], CAPTION, **changes)
    assert message in str(error.value)


def test_a_run_that_lacks_a_stage(model):
    def without(name):
        return dataclasses.replace(model, **{name: None})

    with pytest.raises(ValueError, match="this run has no decoder, which samples images"):
        inpaint(without("decoder"), KEY, [PHOTO], [HOLE], CAPTION)
    with pytest.raises(ValueError, match="this run has no prior, which samples image embeddings"):
        inpaint(without("prior"), KEY, [PHOTO], [HOLE], CAPTION)
    with pytest.raises(ValueError, match="this run has no clip"):
        inpaint(without("clip"), KEY, [PHOTO], [HOLE])
    with pytest.raises(ValueError, match="this run has no decoder"):
        outpaint(without("decoder"), KEY, [PHOTO], CAPTION)


@pytest.fixture
def files(tmp_path) -> dict[str, str]:
    """A photo with its mask, which is painted where it is white, and others."""
    masks = {"mask": HOLE, "empty": HOLE & False, "full": HOLE | True, "small": HOLE[1:]}
    for name, mask in masks.items():
        Image.fromarray(mask).save(tmp_path / f"{name}.png")
    Image.fromarray(PHOTO).save(tmp_path / "photo.png")
    layer = np.zeros((*HOLE.shape, 4), np.uint8)
    layer[HOLE] = 255
    Image.fromarray(layer).save(tmp_path / "layer.png")
    Image.fromarray(PHOTO[:5, :5]).save(tmp_path / "tiny.png")
    (tmp_path / "text.png").write_text("no image")
    return {path.stem: str(path) for path in tmp_path.iterdir()}


def test_masks_of_any_mode(files):
    from dalle2_jax.cli.inpaint import read_mask

    for name in ("mask", "layer"):  # bilevel; white strokes on what is transparent
        np.testing.assert_array_equal(read_mask(Path(files[name])), HOLE)


FEW_STEPS = ["--steps", "3", "--steps", "upsampler=2", "--jump-length", "1", "--jump-samples", "2"]


@pytest.mark.slow
def test_on_the_command_line(tiny, files, tmp_path, capsys):
    run, out = str(tiny.run_dir), tmp_path / "out.png"
    assert cli.main(["inpaint", run, files["photo"], files["layer"], *FEW_STEPS, "--out", str(out)]) == 0
    canvas = square_canvas(PHOTO, HOLE, FINAL_SIZE, 1)
    with Image.open(out) as image:
        np.testing.assert_array_equal(np.asarray(image)[~canvas.mask], canvas.image[~canvas.mask])
        assert image.text["source"] == "photo" and image.text["seed"] == "0"
    more = ["--grid", "--factor", "1.5", "--place", "0,0", "--out", str(tmp_path / "sheet.png")]
    assert cli.main(["outpaint", run, files["photo"], *FEW_STEPS, *more]) == 0
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.size[0] > 2 * 96 and sheet.size[1] > 96  # what was given beside what was painted
    for arguments, message in (
        (["inpaint", run, files["photo"], files["small"]], "the mask is 60 x 47 pixels and the image 60 x 48"),
        (["inpaint", run, files["photo"], files["empty"]], "the mask paints nothing"),
        (["inpaint", run, files["tiny"], files["tiny"]], "is 5 x 5 pixels, too small to paint in"),
        (["inpaint", run, files["photo"], files["text"]], "text.png is no image that can be read"),
        (["outpaint", run, files["photo"], "--place", "left"], "--place takes LEFT,TOP"),
        (["outpaint", run, files["photo"], "--factor", "20"], "factor is 20.0; it must lie in 1 to 8"),
    ):
        assert cli.main([*arguments, "--out", str(tmp_path / "x.png")]) == 2
        message_shown = capsys.readouterr().err
        assert message in message_shown and message_shown.count("\n") == 1


@pytest.mark.slow
def test_glides_inpainting_networks(tmp_path, monkeypatch, capsys):
    folders.small_glide(monkeypatch)
    folder = folders.glide_folder(tmp_path / "files", inpainting=True)
    assert cli.main(["convert", "glide", str(folder), str(tmp_path / "run")]) == 0
    glide = DALLE2.load(tmp_path / "run")
    assert glide.decoder.module.inpainting and glide.upsamplers[0].module.inpainting
    settings = {"decoder": {"steps": "2"}, "upsampler": {"steps": "2"}}
    result = inpaint(glide, KEY, [PHOTO], [HOLE], ["ab c"], guidance_scale=2.0, **settings)
    np.testing.assert_array_equal(result.images[~result.mask], result.original[~result.mask])
    assert (result.images[result.mask] != result.original[result.mask]).mean() > 0.9
    # What is painted follows what is known.
    small = any_in_cells(result.mask, result.stages[0].shape[1])
    other = inpaint(glide, KEY, [255 - PHOTO], [HOLE], ["ab c"], guidance_scale=2.0, **settings)
    assert np.abs(other.stages[0][small].astype(int) - result.stages[0][small]).max() > 2
    with pytest.raises(ValueError, match="reads captions alone; say what the image shows in a caption"):
        inpaint(glide, KEY, [PHOTO], [HOLE])
    with pytest.raises(ValueError, match="reads captions alone; leave image_embeddings out"):
        inpaint(glide, KEY, [PHOTO], [HOLE], ["ab c"], image_embeddings=jnp.zeros((1, 4)))
