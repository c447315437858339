"""Every config in full size, built and counted from shapes alone; `test_lowering` lowers its steps."""

import math
from functools import cache
from pathlib import Path
from typing import Any

import jax
import pytest

from configs import emoji, emoji_large, folder, folder_large, karlo, karlo_large, paper, shapes, shapes_large
from dalle2_jax.diffusion.schedule import respace
from dalle2_jax.sharding import make_mesh
from tests.train.karlo_run import write_karlo_run
from train.config.system import System
from train.run.plan import plan, plan_stages

SYSTEMS = {
    "shapes": shapes,
    "shapes_large": shapes_large,
    "emoji": emoji,
    "emoji_large": emoji_large,
    "paper": paper,
}


@cache
def system(name: str) -> System:
    return SYSTEMS[name].system()


def count(tree: Any) -> int:
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize("name", SYSTEMS)
def test_a_config_is_a_whole_cascade(name):
    stages = {stage: system(name).stages[stage] for stage in system(name).usual_stages}
    assert list(stages)[:3] == ["clip", "prior", "decoder"]
    kinds = [recipe.kind for recipe in stages.values()]
    assert kinds == ["clip", "prior", "decoder"] + ["upsampler"] * (len(stages) - 3)
    size = stages["decoder"].module.unet.image_size
    for recipe in list(stages.values())[3:]:
        assert recipe.low_size == size, "each upsampler takes what the stage before it makes"
        size = recipe.size
    for recipe in stages.values():
        if hasattr(recipe, "sampling"):
            assert respace(recipe.sampling.steps, recipe.process.timesteps)
    readers = [stages["clip"].module.text, stages["prior"].module, stages["decoder"].module.text]
    for module in filter(None, readers):
        assert module.context_length == system(name).context_length
        assert module.vocabulary_size in (system(name).vocabulary_size, None)


def test_the_paper_has_the_sizes_of_table_3():
    parameters = {stage.name: stage.params for stage in plan(system("paper"))}
    near = {"rel": 0.01}
    assert count(parameters["clip"]["vision"]["transformer"]) == pytest.approx(12 * 32 * 1280**2, **near)
    assert count(parameters["clip"]["text"]["transformer"]) == pytest.approx(12 * 24 * 1024**2, **near)
    assert count(parameters["prior"]["transformer"]) == pytest.approx(1.209e9, **near)
    assert count(parameters["decoder"]["unet"]) == pytest.approx(2.238e9, **near)
    assert count(parameters["decoder"]["text"]) == pytest.approx(1.313e9, **near)
    assert count(parameters["decoder"]) == pytest.approx(3.55e9, **near)
    assert count(parameters["upsampler"]) == pytest.approx(691.6e6, **near)
    assert count(parameters["upsampler_1024"]) == pytest.approx(267.1e6, **near)


def test_the_other_prior_of_the_paper_has_two_billion_parameters():
    """Table 3 says one: its two transformers, 24 layers of 12 w^2 + 13 w each, are two already."""
    found = next(stage.params for stage in plan(system("paper")) if stage.name == "autoregressive_prior")
    layers = {width: 24 * (12 * width**2 + 13 * width) for width in (1664, 2048)}
    assert count(found["transformer"]) == layers[1664]
    assert count(found["text"]["transformer"]) == layers[2048]
    rest = 49_408 * 2048 + 2 * 256 * 2048 + 2 * 2048  # the caption encoder's tokens, positions, padding, norm
    rest += 2048 * 1664 + 1664 + 1024 * 1664 + 1664 + 2 * 1664 + 2 * 1024 * 1664  # projections, nulls, codes
    rest += (256 + 1 + 319) * 1664 + 2 * 1664 + 1664 * 1024 + 1024  # positions, norm and logits
    assert count({name: tree for name, tree in found.items() if name != "codec"}) == sum(layers.values()) + rest
    assert count(found) == pytest.approx(2.1e9, rel=0.03)
    assert found["codec"]["components"].shape == (319, 1024) and found["codec"]["edges"].shape == (319, 1025)


def test_the_paper_has_the_training_of_table_3():
    found = {}
    for name, recipe in system("paper").stages.items():
        adam = recipe.optimizer
        numbers = (adam.learning_rate, adam.weight_decay, adam.beta1, adam.beta2, adam.epsilon, adam.ema_decay)
        found[name] = (recipe.batch_size, recipe.steps, *numbers)
    assert found["prior"] == (4096, 600_000, 1.1e-4, 6e-2, 0.9, 0.96, 1e-6, 0.9999)
    assert found["decoder"] == (2048, 800_000, 1.2e-4, 0, 0.9, 0.999, 1e-8, 0.9999)
    assert found["upsampler"] == (1024, 1_000_000, 1.2e-4, 0, 0.9, 0.999, 1e-8, 0.9999)
    assert found["upsampler_1024"] == (512, 1_000_000, 1e-4, 0, 0.9, 0.999, 1e-8, 0.9999)
    assert found["autoregressive_prior"] == (4096, 1_000_000, 1.6e-4, 4e-2, 0.9, 0.91, 1e-10, 0.999)
    stages = [system("paper").stages[name] for name in system("paper").usual_stages[1:]]
    assert [stage.process.schedule for stage in stages] == ["cosine", "cosine", "cosine", "linear"]
    assert {stage.process.timesteps for stage in stages} == {1000}
    visited = [len(respace(stage.sampling.steps, 1000)) for stage in stages]
    assert visited == [64, 250, 27, 15]
    assert [stage.module.unet.dropout for stage in stages[1:]] == [0.1, 0.1, 0.0]


@pytest.mark.parametrize(("module", "like"), [(folder, emoji), (folder_large, emoji_large)])
def test_a_folder_is_trained_as_emoji_are(module, like):
    own, other = module.system("images/my pets"), like.system()
    assert own.name == "my pets" and [*own.stages] == [*other.stages]
    for name, recipe in own.stages.items():
        assert recipe.module == other.stages[name].module and recipe.steps < other.stages[name].steps
        assert recipe.optimizer.warmup_steps < recipe.steps
    assert (own.data.name, own.data.folder) == ("folder", str(Path("images/my pets").resolve()))
    assert own.data.image_size == other.data.image_size == (128 if module is folder_large else 64)
    assert all(
        own.stages[name].steps == folder.STEPS[name] * (2 if module is folder_large else 1) for name in own.stages
    )


def test_karlo_is_tuned_from_a_converted_run(tmp_path):
    """Its networks are those of the run, so that a small one will do."""
    run, lines = write_karlo_run(tmp_path), []
    for module in (karlo, karlo_large):
        own = module.system(str(run), "images/my pets")
        assert own.name == "my pets" and [*own.stages] == ["prior", "decoder"]
        assert (own.data.name, own.data.folder) == ("folder", str(Path("images/my pets").resolve()))
        assert (own.vocabulary_size, own.context_length) == (600, 9)
        for name, recipe in own.stages.items():
            assert recipe.init_from == own.given[name] == str(run / name)
            assert recipe.optimizer.warmup_steps <= recipe.steps // 10
            assert respace(recipe.sampling.steps, recipe.process.timesteps)
    assert [recipe.text_drop for recipe in own.stages.values()] == [0.2, 0.3]
    plan_stages(own, ["prior", "decoder"], tmp_path / "tuned", make_mesh(fsdp=8), lines.append)
    assert [line.split(":")[0] for line in lines] == ["prior", "decoder", "clip", "upsampler", "dry run"]
    assert not (tmp_path / "tuned").exists()
