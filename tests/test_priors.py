"""Two priors in one run, and a stranger's: each is loaded, sampled and compared by the same calls."""

import dataclasses
import json
import shutil
from dataclasses import dataclass
from types import SimpleNamespace

import flax.linen as nn
import jax
import numpy as np
import pytest

from dalle2_jax import DALLE2, cli
from dalle2_jax.checkpoint import LoadedStage, StageRecord, load_params, load_stage
from dalle2_jax.errors import InputError
from dalle2_jax.evaluation.ablation import CAPTION_ALONE, TEXT_EMBEDDING, diversity, format_ablation
from dalle2_jax.layers.embedding import unit_norm
from dalle2_jax.prior import AutoregressivePrior, AutoregressiveSampling, Codec, DiffusionPrior, Prior, fit_pca
from dalle2_jax.unclip import generate_best
from dalle2_jax.unclip.embed import embed_images
from dalle2_jax.unclip.memory import memory_of_sampling
from tests import cascade
from tests.cascade import EMBEDDING, FINAL_SIZE

CAPTIONS = ["a small red circle on a gray background", "a large blue cross", "a yellow square on a white background"]
OTHER = "autoregressive_prior"


@pytest.fixture(scope="module")
def run(tiny, tmp_path_factory):
    """The tiny run with its other prior, which is trained in two parts."""
    folder = tmp_path_factory.mktemp("priors") / "both"
    shutil.copytree(tiny.run_dir, folder)
    result, log = cascade.train(tiny.system, folder, [OTHER], stop_after_steps=2)
    assert not result.finished and any("the codec is fitted to 64 embeddings" in line for line in log)
    result, log = cascade.train(tiny.system, folder, [OTHER])
    assert result.finished and not any("is fitted" in line for line in log), "it is fitted once"
    return folder


@pytest.fixture(scope="module")
def model(run):
    return DALLE2.load(run, prior=OTHER)


def test_the_usual_stages_leave_it_out(tiny):
    assert tiny.system.optional == (OTHER,) and OTHER not in tiny.system.usual_stages
    assert dataclasses.replace(tiny.system, stages={"clip": tiny.system.stages["clip"]}).usual_stages == ["clip"]


def test_a_run_has_two_priors(run, model):
    usual = DALLE2.load(run)
    assert isinstance(usual.prior.module, DiffusionPrior) and isinstance(model.prior.module, AutoregressivePrior)
    assert repr(model) == f"DALLE2(clip: clip, {OTHER}: prior, decoder: decoder, upsampler: upsampler)"
    for each in (usual, model):
        assert isinstance(each.prior.module, Prior)
        embeddings = each.sample_prior(jax.random.key(0), CAPTIONS)
        assert embeddings.shape == (3, EMBEDDING)
        np.testing.assert_allclose(np.linalg.norm(embeddings, axis=1), 1, rtol=1e-5)
        assert each.generate(jax.random.key(0), CAPTIONS).shape == (3, FINAL_SIZE, FINAL_SIZE, 3)
    with pytest.raises(InputError, match=rf"has no prior 'gan'; its priors are: {OTHER}, prior"):
        DALLE2.load(run, prior="gan")


def test_a_run_whose_priors_have_other_names(run, tmp_path):
    for name in ("clip", OTHER):
        shutil.copytree(run / name, tmp_path / name)
    assert DALLE2.load(tmp_path).prior.name == OTHER
    shutil.copytree(run / "prior", tmp_path / "diffusion")
    record = json.loads((tmp_path / "diffusion" / "stage.json").read_text())
    (tmp_path / "diffusion" / "stage.json").write_text(json.dumps({**record, "stage": "diffusion"}))
    with pytest.raises(InputError, match=rf"has the priors {OTHER}, diffusion; say which by prior='{OTHER}'"):
        DALLE2.load(tmp_path)
    shutil.rmtree(tmp_path / OTHER)
    shutil.rmtree(tmp_path / "diffusion")
    with pytest.raises(InputError, match="has no prior 'prior'; it has none"):
        DALLE2.load(tmp_path, prior="prior")


def test_stopped_and_resumed_is_left_alone(tiny, run, tmp_path):
    shutil.copytree(tiny.run_dir / "clip", tmp_path / "clip")
    assert cascade.train(tiny.system, tmp_path, [OTHER])[0].finished
    for ema in (True, False):
        halves = load_params(run / OTHER, ema), load_params(tmp_path / OTHER, ema)
        jax.tree.map(np.testing.assert_array_equal, *halves)
    numbers = [(folder / OTHER / "metrics.jsonl").read_text().splitlines() for folder in (run, tmp_path)]
    losses = [[line for line in lines if '"loss"' in line] for lines in numbers]
    assert losses[0] == losses[1] and len(losses[0]) >= cascade.STEPS


def test_the_codec_is_that_of_the_training_images_and_not_trained(run, model, tiny):
    raw, averaged = (load_stage(run / OTHER, ema).params for ema in (False, True))
    jax.tree.map(np.testing.assert_array_equal, raw["codec"], averaged["codec"])
    moved = jax.tree.map(lambda a, b: bool(np.any(a != b)), raw["out"], averaged["out"])
    assert all(jax.tree.leaves(moved)), "the rest is"
    codec = model.prior.module.apply({"params": model.prior.params}, method=lambda module: module.codec())
    assert isinstance(codec, Codec) and codec.edges.shape == (4, 9) and (np.diff(codec.edges, axis=1) > 0).all()
    from dalle2_jax.data.pipeline import evaluation_examples

    data = tiny.system.data
    examples = evaluation_examples(data, data.train_split, 96)
    embeddings = np.asarray(embed_images(model.clip, list(examples.images)))
    own = fit_pca([embeddings], 4)
    # 64 of the 96 images: near, and far from any other directions.
    assert np.abs(np.sum(np.asarray(codec.pca.components[0]) * np.asarray(own.components[0]))) > 0.95
    np.testing.assert_allclose(codec.pca.mean, embeddings.mean(0), atol=0.05)
    fields = model.prior.record.training
    assert (fields["edges"], fields["codec_examples"], fields["text_drop"]) == ("uniform", 64, 0.1)
    assert model.prior.record.rebuilt("sampling") == AutoregressiveSampling(candidates=2)


def test_settings_of_the_other_prior(model):
    key = jax.random.key(0)
    first = model.sample_prior(key, CAPTIONS)
    assert np.abs(model.sample_prior(key, CAPTIONS, temperature=0.5, top_k=3) - first).max() > 1e-3
    assert np.abs(model.sample_prior(key, CAPTIONS, guidance_scale=3.0, top_p=0.9) - first).max() > 1e-3
    assert model.evaluations("prior", {"guidance_scale": 2.0}) == 4 * 2 * 2
    with pytest.raises(InputError, match="sampling has no field 'steps'"):
        model.sample_prior(key, CAPTIONS, steps=25)
    with pytest.raises(InputError, match="sampling has no field 'temperature'"):
        model.decode(key, first, CAPTIONS, temperature=2.0)


def test_its_memory_is_planned(run):
    stages = {memory.stage: memory for memory in memory_of_sampling(run)}
    assert stages[OTHER].weights > 0 and stages[OTHER].working > 0


class TextPrior(nn.Module):
    """A stranger's prior: the caption's own embedding, turned a little by its key."""

    embedding_size: int = EMBEDDING

    @property
    def needs_empty_caption(self) -> bool:
        return False

    @nn.nowrap
    def sample_embeddings(self, params, keys, captions, sampling, process=None, empty=None):
        noise = jax.vmap(lambda key: jax.random.normal(key, (self.embedding_size,)))(keys)
        return unit_norm(captions.embedding + params["scale"] * noise)


@dataclass(frozen=True)
class Nothing:
    candidates: int = 1


def test_a_strangers_prior_fits(model):
    record = StageRecord.of({"stage": "text", "kind": "prior", "module": None, "sampling": AutoregressiveSampling()})
    stage = LoadedStage(TextPrior(), {"scale": np.float32(0.0)}, record)
    stranger = dataclasses.replace(model, prior=stage)
    text = stranger.encode_text(CAPTIONS).embedding
    np.testing.assert_allclose(stranger.sample_prior(jax.random.key(0), CAPTIONS), text, atol=1e-5)
    moving = dataclasses.replace(stranger, prior=dataclasses.replace(stage, params={"scale": np.float32(1.0)}))
    near = moving.sample_prior(jax.random.key(0), CAPTIONS, candidates=64)
    far = moving.sample_prior(jax.random.key(0), CAPTIONS)
    assert ((near * text).sum(1) > (far * text).sum(1)).all()
    assert stranger.generate(jax.random.key(0), CAPTIONS, return_stages=True).image_embeddings.shape == text.shape


# The image embedding withheld, and the best of several


def test_without_the_image_embedding_only_the_caption_speaks(model):
    key = jax.random.key(0)
    alone = model.generate(key, CAPTIONS, embedding_to_decoder=False, return_stages=True)
    assert alone.image_embeddings is None
    no_prior = dataclasses.replace(model, prior=None)
    np.testing.assert_array_equal(no_prior.generate(key, CAPTIONS, embedding_to_decoder=False), alone.images)
    null = model.decoder.params["null_image"] / np.sqrt(EMBEDDING)
    as_null = model.generate(key, CAPTIONS, image_embeddings=np.tile(null, (3, 1)), decoder={"guidance_scale": 1.0})
    withheld = model.generate(key, CAPTIONS, embedding_to_decoder=False, decoder={"guidance_scale": 1.0})
    assert np.abs(as_null.astype(int) - withheld).max() <= 1
    with pytest.raises(InputError, match="image embeddings were given and are withheld"):
        model.generate(key, CAPTIONS, embedding_to_decoder=False, image_embeddings=np.tile(null, (3, 1)))


def test_the_best_images_are_those_that_clip_says(model):
    key = jax.random.key(4)
    best, scores = generate_best(model, key, CAPTIONS[:2], candidates=4, keep=2)
    assert best.captions == (CAPTIONS[0],) * 2 + (CAPTIONS[1],) * 2 and best.images.shape[0] == scores.size == 4
    keys = jax.vmap(lambda one: jax.random.split(one, 4))(jax.random.split(key, 2)).reshape(-1)
    every = model.generate(keys, [caption for caption in CAPTIONS[:2] for _ in range(4)])
    for number in range(2):
        images = every[4 * number : 4 * number + 4]
        cosines = np.asarray(model.scores(images, [CAPTIONS[number]]))[:, 0]
        order = np.argsort(-cosines)[:2]
        np.testing.assert_array_equal(best.images[2 * number : 2 * number + 2], images[order])
        np.testing.assert_allclose(scores[2 * number : 2 * number + 2], cosines[order], atol=1e-6)
    for candidates, keep, sentence in ((0, 1, "candidates is 0"), (3, 4, "4 images are to be kept of 3 candidates")):
        with pytest.raises(InputError, match=sentence):
            generate_best(model, key, CAPTIONS[0], candidates=candidates, keep=keep)


def test_the_command_keeps_the_best(run, model, tmp_path, capsys):
    out = tmp_path / "best"
    options = ["--candidates", "4", "--keep", "2", "--seed", "7", "--prior", OTHER, "--temperature", "0.8"]
    assert cli.main(["generate", str(run), *CAPTIONS[:2], *options, "--out", str(out)]) == 0
    captured = capsys.readouterr()
    written = captured.out.split()
    assert len(written) == 4 and captured.err.count("CLIP: ") == 2
    seeds = [int(name.rpartition("_")[2].removesuffix(".png")) for name in written]
    assert all(7 <= seed < 11 for seed in seeds) and len(set(seeds[:2])) == 2
    keys = jax.numpy.stack([jax.random.key(seed) for seed in range(7, 11)])
    images = model.generate(keys, [CAPTIONS[0]] * 4, prior={"temperature": 0.8})
    cosines = np.asarray(model.scores(images, CAPTIONS[:1]))[:, 0]
    assert seeds[:2] == [7 + place for place in np.argsort(-cosines)[:2]]


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--keep", "2"], "--keep 2 goes with --candidates N"),
        (["--candidates", "2", "--keep", "3"], "3 images are to be kept of 2 candidates; keep 1 to 2"),
        (["--candidates", "few"], "--candidates takes a number, not 'few'"),
        (["--candidates", "2", "--count", "2"], "--count 2 does not go with --candidates"),
        (["--prior", "gan"], "has no prior 'gan'"),
        (["--top-k", "0", "--prior", OTHER], "top_k is 0; it must be 1 or more"),
    ],
)
def test_refused_on_the_command_line(run, tmp_path, capsys, options, sentence):
    assert cli.main(["generate", str(run), CAPTIONS[0], *options, "--out", str(tmp_path / "a.png")]) == 2
    error = capsys.readouterr().err
    assert sentence in error and error.count("\n") == 1


# The ablation


@pytest.mark.slow
def test_the_ablation_of_a_run(run, capsys):
    assert cli.main(["ablate", str(run), "--count", "6"]) == 0
    report = json.loads((run / "ablation.json").read_text())["ways"]
    assert list(report) == [OTHER, "prior", TEXT_EMBEDDING, CAPTION_ALONE]
    for way, splits in report.items():
        for figures in splits.values():
            assert 0 <= figures["all"] <= figures["color"] <= 1 and 0 <= figures["r1"] <= 1
            assert ("to_text" in figures) == (way in (OTHER, "prior"))
        assert "diversity" in splits["test"]
    table = capsys.readouterr().out.splitlines()[-6:]
    assert table[0].startswith("| | all right | unseen pairs |") and table[2].startswith("| autoregressive prior |")


def test_the_table_has_the_mean_and_half_the_range():
    data = SimpleNamespace(test_split="test", unseen_split="unseen")
    reports = [{"prior": {"test": {"all": value, "r1": 0.5}}} for value in (0.5, 0.7, 0.9)]
    assert format_ablation(reports, data).splitlines() == [
        "| | all right | R@1 |",
        "|---|---|---|",
        "| prior | 0.70 ± 0.20 | 0.50 ± 0.00 |",
    ]


def test_diversity_is_the_mean_distance_within_a_caption():
    a, b = np.array([1.0, 0.0]), np.array([0.0, 2.0])
    assert diversity(np.stack([a, a, a, b, b, b]), 3) == pytest.approx(0)
    assert diversity(np.stack([a, b, -a, b]), 2) == pytest.approx(1)
    assert diversity(np.stack([a, a, b]), 3) == pytest.approx(2 / 3)
