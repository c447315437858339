"""Every source by `dalle2 convert`, and what the run that comes of it can do."""

import json

import jax
import numpy as np
import pytest
from PIL import Image

from dalle2_jax import DALLE2
from dalle2_jax.cli import main
from dalle2_jax.clip import CLIP
from dalle2_jax.tokenizer import ClipTokenizer
from dalle2_jax.unclip.memory import memory_of_sampling
from dalle2_jax.weights.sources import clip as clip_weights
from dalle2_jax.weights.sources import open_clip as open_clip_weights
from tests.weights import folders

KEY = jax.random.key(0)


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    place = tmp_path_factory.mktemp("sources")
    return {
        "clip": folders.clip_folder(place / "clip"),
        "open_clip": folders.open_clip_folder(place / "open_clip"),
        "karlo": folders.karlo_folder(place / "karlo"),
        "variation": folders.karlo_folder(place / "variation", "UnCLIPImageVariationPipeline"),
        "kandinsky": folders.kandinsky_folder(place / "kandinsky"),
    }


@pytest.fixture(scope="module")
def karlo_run(sources, tmp_path_factory):
    """Karlo with a whole CLIP in place of its half."""
    run = tmp_path_factory.mktemp("run") / "karlo"
    assert main(["convert", "karlo", str(sources["karlo"]), str(run), "--clip", str(sources["clip"])]) == 0
    return run


@pytest.fixture(scope="module")
def photo(tmp_path_factory):
    path = tmp_path_factory.mktemp("photo") / "photo.png"
    Image.fromarray(np.random.RandomState(0).randint(0, 255, (21, 30, 3), np.uint8)).save(path)
    return path


def quick(model, **more):
    steps = {name: {"steps": "2"} for name in ("prior", "decoder", "upsampler")}
    return {name: steps[name] for name in steps if getattr(model, name, None) or name == "upsampler"} | more


def test_what_a_converted_run_is_and_takes(karlo_run, capsys):
    assert main(["describe", str(karlo_run), "--memory"]) == 0
    message = capsys.readouterr().out
    assert "CreativeML Open RAIL-M" in " ".join(message.split())
    lines = [line.split() for line in message[message.index("GiB for one image") :].splitlines()[1:]]
    assert [line[0] for line in lines] == ["clip", "prior", "decoder", "upsampler"]
    full = {memory.stage: memory for memory in memory_of_sampling(karlo_run)}
    model = DALLE2.load(karlo_run)
    for stage in model.stages:
        assert full[stage.name].weights == sum(leaf.nbytes for leaf in jax.tree.leaves(stage.params))
        assert full[stage.name].working > 0
    half = next(memory_of_sampling(karlo_run, "bfloat16"))
    assert 2 * half.weights == full[half.stage].weights


@pytest.mark.parametrize("source", ["clip", "open_clip"])
def test_clip(sources, photo, tmp_path, capsys, source):
    run = tmp_path / "run"
    assert main(["convert", source, str(sources[source]), str(run)]) == 0
    message = capsys.readouterr().out
    assert "CLIP: " in message and "parameters" in message and "licence of the weights: MIT" in message
    model = DALLE2.load(run)
    assert np.linalg.norm(np.asarray(model.encode_text(["a b"]).embedding)) == pytest.approx(1, abs=1e-5)
    with pytest.raises(ValueError, match="this run has no decoder, which samples images; its stages are: clip"):
        model.generate(KEY, ["a b"])
    # On the command line.
    assert main(["clip", "score", str(run), str(photo), "--caption", "a b", "--caption", "b c"]) == 0
    lines = capsys.readouterr().out.splitlines()
    image = np.asarray(Image.open(photo))
    scores = np.asarray(model.scores([image], ["a b", "b c"]))
    assert [line.split()[:2] for line in lines] == [["photo.png", f"{value:+.4f}"] for value in scores[0]]
    classes = ["--class", "a", "--class", "b", "--template", "see {}", "--template", "{} here"]
    assert main(["clip", "classify", str(run), str(photo), *classes]) == 0
    name, best, chance, *_ = capsys.readouterr().out.split()
    chances = np.asarray(model.classify([image], ["a", "b"], ["see {}", "{} here"]))[0]
    assert (name, best) == ("photo.png", "ab"[chances.argmax()]) and float(chance) == pytest.approx(
        chances.max(), abs=1e-3
    )
    assert main(["clip", "classify", str(run), str(photo), "--class", "a"]) == 2
    assert main(["clip", "classify", str(run), str(photo), "--class", "a", "--class", "b", "--template", "x"]) == 2
    assert main(["clip", "score", str(run), str(run / "clip" / "stage.json"), "--caption", "a"]) == 2
    message = capsys.readouterr().err.splitlines()
    assert "two or more" in message[0] and "has no {}" in message[1] and "is no image that can be read" in message[2]


def test_classifying_is_a_softmax_over_mean_embeddings(sources, tmp_path):
    run = tmp_path / "run"
    main(["convert", "clip", str(sources["clip"]), str(run)])
    model = DALLE2.load(run)
    image = np.random.RandomState(1).randint(0, 255, (16, 16, 3), np.uint8)
    text = {caption: np.asarray(model.encode_text([caption]).embedding)[0] for caption in ("x a", "y a", "x b", "y b")}
    mean = np.stack([(text[f"x {name}"] + text[f"y {name}"]) for name in "ab"])
    mean /= np.linalg.norm(mean, axis=1, keepdims=True)
    scale = min(np.exp(float(model.clip.params["logit_scale"])), 100)
    logits = scale * mean @ np.asarray(model.encode_image(image[None]))[0]
    expected = np.exp(logits - logits.max())
    found = model.classify([image], ["a", "b"], ["x {}", "y {}"])[0]
    np.testing.assert_allclose(found, expected / expected.sum(), atol=1e-5)


def test_karlo_draws_and_varies(karlo_run, photo, tmp_path, capsys):
    model = DALLE2.load(karlo_run)
    assert model.prior.record.rebuilt("process").clip == 5.0 and model.recorded("sampling").guidance_scale == 4.0
    images = model.generate(KEY, ["a b"], **quick(model))
    assert images.shape == (1, 32, 32, 3) and images.std() > 0
    few = ["--steps", "2", "--steps", "upsampler=2", "--out", str(tmp_path / "out")]
    assert main(["vary", str(karlo_run), str(photo), "--count", "2", *few]) == 0
    names = [path.rsplit("/", 1)[1] for path in capsys.readouterr().out.split()]
    assert names == ["000_photo_0.png", "000_photo_1.png"]
    drawn = np.asarray(Image.open(tmp_path / "out" / names[0]))
    again = model.vary(jax.random.key(0)[None], [np.asarray(Image.open(photo))], **quick(model, prior={}))
    np.testing.assert_array_equal(drawn, again[0])
    assert Image.open(tmp_path / "out" / names[0]).text["source"] == "photo"
    assert main(["vary", str(karlo_run), str(photo), "--steps", "prior=3"]) == 2
    assert "no prior is at work in variations" in capsys.readouterr().err


def test_the_variation_pipeline_has_no_prior(sources, photo, tmp_path, capsys):
    run = tmp_path / "run"
    assert main(["convert", "karlo", str(sources["variation"]), str(run)]) == 0
    assert main(["generate", str(run), "a b", "--out", str(tmp_path / "out")]) == 2
    assert "this run has no prior, which samples image embeddings of captions" in capsys.readouterr().err
    few = ["--steps", "2", "--steps", "upsampler=2", "--out", str(tmp_path / "x.png")]
    assert main(["vary", str(run), str(photo), *few]) == 0


def test_the_halves_of_karlo_see_no_images(sources, photo, tmp_path, capsys):
    run = tmp_path / "run"
    assert main(["convert", "karlo", str(sources["karlo"]), str(run)]) == 0
    assert main(["vary", str(run), str(photo), "--out", str(tmp_path / "x.png")]) == 2
    assert "reads captions alone; convert a run with an image encoder (--clip)" in capsys.readouterr().err


def test_kandinsky(sources, tmp_path):
    run = tmp_path / "run"
    assert main(["convert", "kandinsky", str(sources["kandinsky"]), str(run)]) == 0
    model = DALLE2.load(run)
    drawn = np.asarray(model.sample_prior(KEY, ["a b", "c"], steps="2"))
    assert drawn.shape == (2, 24) and np.isfinite(drawn).all()
    assert np.asarray(model.encode_image(np.zeros((1, 16, 16, 3), np.uint8))).shape == (1, 24)


def test_karlo_as_published(sources, tmp_path, monkeypatch, capsys):
    folders.small_karlo(monkeypatch)
    (whole,) = clip_weights.conversions(sources["clip"], unit_norm=False)
    folder = folders.original_folder(tmp_path / "files", whole)
    assert main(["convert", "karlo", str(folder), str(tmp_path / "run")]) == 2
    assert "come without CLIP; add --clip openai/clip-vit-large-patch14" in capsys.readouterr().err
    assert main(["convert", "karlo", str(folder), str(tmp_path / "run"), "--clip", str(sources["clip"])]) == 0
    message = capsys.readouterr().out
    for published in ("1,022,028,544", "885,439,686", "7,878,400", "691,579,523"):
        assert f"(published: {published})" in message
    model = DALLE2.load(tmp_path / "run")
    assert model.prior.record.rebuilt("process").clip == 10.0 and model.prior.module.embedding_mean[0] == np.float32(
        0.1
    )
    assert model.generate(KEY, ["a b"], **quick(model)).shape == (1, 32, 32, 3)
    (folder / "ViT-L-14_stats.safetensors").unlink()
    assert main(["convert", "karlo", str(folder), str(tmp_path / "again"), "--clip", str(sources["clip"])]) == 2
    assert "has 0 files *_stats.*; Karlo's statistics is one" in capsys.readouterr().err


@pytest.mark.parametrize("inpainting", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_glide(tmp_path, monkeypatch, capsys, inpainting):
    folders.small_glide(monkeypatch)
    folder = folders.glide_folder(tmp_path / "files", inpainting)
    assert main(["convert", "glide", str(folder), str(tmp_path / "run")]) == 0
    assert ("385,037,638" if inpainting else "385,030,726") in capsys.readouterr().out
    model = DALLE2.load(tmp_path / "run")
    assert model.clip is None and model.prior is None
    assert next(memory_of_sampling(tmp_path / "run")).stage == "decoder"  # neither CLIP nor prior is missed
    settings = {name: {"steps": "2"} for name in ("decoder", "upsampler")}
    captions = ["ab c"] if inpainting else ["ab c", "d"]
    images = model.generate(jax.random.split(KEY, len(captions)), captions, **settings)
    assert images.shape == (len(captions), 16, 16, 3) and model.image_size == 16
    with pytest.raises(ValueError, match="reads captions alone; leave image_embeddings out"):
        model.generate(KEY, ["ab c"], image_embeddings=np.zeros((1, 4)))
    with pytest.raises(ValueError, match="reads captions and does not work in tiles"):
        model.generate(KEY, ["ab c"], tile=8, **settings)
    with pytest.raises(ValueError, match="this run has no clip"):
        model.encode_image(np.zeros((1, 8, 8, 3), np.uint8))
    (folder / "encoder.json").unlink()
    assert main(["convert", "glide", str(folder), str(tmp_path / "again")]) == 2
    assert "holds no vocabulary of GLIDE's" in capsys.readouterr().err
    assert not (tmp_path / "again").exists()


def test_bfloat16(sources, karlo_run, tmp_path):
    """Weights of half the size, arithmetic in bfloat16, and nearly the same embeddings."""
    run = tmp_path / "run"
    whole = str(sources["clip"])
    assert main(["convert", "karlo", str(sources["karlo"]), str(run), "--clip", whole, "--dtype", "bfloat16"]) == 0
    half, full, cast = DALLE2.load(run), DALLE2.load(karlo_run), DALLE2.load(karlo_run, dtype="bfloat16")
    for model in (half, cast):
        for stage in model.stages:
            assert {str(leaf.dtype) for leaf in jax.tree.leaves(stage.params)} == {"bfloat16"}
        assert model.decoder.module.unet.dtype == "bfloat16"
        drawn, expected = (np.asarray(one.sample_prior(KEY, ["a b"], steps="2")) for one in (model, full))
        assert np.abs(drawn - expected).max() < 0.1 * np.abs(expected).max()
        assert not np.array_equal(drawn, expected)
    assert DALLE2.load(run, dtype="float32").decoder.module.unet.dtype == "float32"
    with pytest.raises(ValueError, match="dtype is 'float16'; it must be float32 or bfloat16"):
        DALLE2.load(run, dtype="float16")


@pytest.mark.slow
def test_weights_shared_out_among_devices(karlo_run, monkeypatch):
    """The same images from parameters that no device holds whole."""
    whole = DALLE2.load(karlo_run)
    monkeypatch.setattr("dalle2_jax.unclip.placement.partition", _eager_partition)
    split = DALLE2.load(karlo_run, shard=True)
    kernel = split.decoder.params["unet"]["conv_in"]["kernel"]
    assert len(kernel.sharding.device_set) == len(jax.devices()) > 1 and not kernel.is_fully_replicated
    one, other = (np.asarray(model.sample_prior(KEY, ["a b"], steps="2")) for model in (whole, split))
    np.testing.assert_allclose(one, other, atol=1e-3 * np.abs(one).max())
    captions = ["a b"] * len(jax.devices())
    one, other = (model.generate(KEY, captions, **quick(model)) for model in (whole, split))
    # Sums in another order; networks as untrained as these enlarge that here and there.
    assert np.abs(one.astype(int) - other).mean() < 0.1


def _eager_partition(params, mesh):
    from dalle2_jax.sharding import partition

    return partition(params, mesh, smallest=1)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["karlo", "{clip}"], "holds neither diffusers' model_index.json nor Karlo's original files"),
        (["clip", "{karlo}"], "there is no .*config.json; is it the folder of another model"),
        (["open_clip", "{clip}"], "there is no .*open_clip_config.json"),
        (["kandinsky", "{karlo}"], "holds a UnCLIPPipeline; a folder of KandinskyPriorPipeline"),
        (["glide", "{clip}"], "does not hold base and upsample or base_inpaint and upsample_inpaint"),
        (["karlo", "{nowhere}"], "nowhere is not there; name a folder, or a repository such as"),
        (["clip", "{clip}", "--clip", "{clip}"], "--clip goes with karlo, not with clip"),
        (["clip", "{clip}", "--vocabulary", "{clip}"], "--vocabulary goes with open_clip and glide"),
        (["open_clip", "{open_clip}", "--vocabulary", "{nowhere}"], "holds no vocabulary of CLIP's"),
    ],
)
def test_what_is_no_such_source(sources, tmp_path, capsys, arguments, words):
    import re

    places = {**sources, "nowhere": tmp_path / "nowhere"}
    source, src, *rest = (word.format(**places) for word in arguments)
    assert main(["convert", source, src, str(tmp_path / "run"), *rest]) == 2
    message = capsys.readouterr().err
    assert re.search(words, message) and message.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_run_that_is_there_stays(sources, karlo_run, capsys):
    before = (karlo_run / "clip" / "stage.json").read_text()
    assert main(["convert", "clip", str(sources["clip"]), str(karlo_run)]) == 2
    assert "exists already; name a folder to make" in capsys.readouterr().err
    assert (karlo_run / "clip" / "stage.json").read_text() == before
    assert json.loads(before)["source"]["name"] == "karlo"


OPEN_CLIP_TEXT = {"context_length": 77, "vocab_size": 49_408}
SIZES = {
    "B/32": ({"hidden_size": 768, "patch_size": 32}, 512, 8),
    "B/16": ({"hidden_size": 768, "patch_size": 16}, 512, 8),
    "L/14": ({"hidden_size": 1024, "patch_size": 14, "num_hidden_layers": 24, "num_attention_heads": 16}, 768, 12),
}


@pytest.mark.parametrize("name", [*SIZES, "L/14-336", "H/14", "bigG/14"])
def test_published_sizes_of_clip(name):
    """Built from shapes alone; open_clip's totals were counted with its own code."""
    if name in ("H/14", "bigG/14"):
        large = name == "bigG/14"
        vision = {"image_size": 224, "patch_size": 14, "layers": 48 if large else 32, "width": 1664 if large else 1280}
        vision |= {"head_width": 104, "mlp_ratio": 4.9231} if large else {"head_width": 80}
        width, heads, layers = (1280, 20, 32) if large else (1024, 16, 24)
        text = {**OPEN_CLIP_TEXT, "width": width, "heads": heads, "layers": layers}
        module = open_clip_weights.clip_module({"embed_dim": width, "vision_cfg": vision, "text_cfg": text}, name)
        table = open_clip_weights.clip_table(module)
    else:
        vision, width, heads = SIZES[name.removesuffix("-336")]
        vision = {**vision, "image_size": 336 if name.endswith("336") else 224}
        vision.setdefault("intermediate_size", 4 * vision["hidden_size"])
        sizes = {"hidden_size": width, "intermediate_size": 4 * width, "num_attention_heads": heads}
        text = clip_weights.text_module(sizes)
        module = CLIP(vision=clip_weights.vision_module(vision), text=text, embedding_size=width)
        table = clip_weights.clip_table(module)
    tokenizer = ClipTokenizer(tuple(map(str, range(49_408))), ())
    conversion = clip_weights.stage(module, table, folders.NOTHING, tokenizer)
    (line,) = conversion.parameter_counts()
    count, _, published = line.partition(" parameters (published: ")
    assert count.removeprefix("CLIP: ") == published.rstrip(")")
