"""Any field by its path; a wrong path names the right one, a wrong type says what is expected."""

import dataclasses
from dataclasses import dataclass, field

import flax.linen as nn
import pytest

from train.config.overrides import all_paths, apply_overrides


class Net(nn.Module):
    channels: int = 3
    multipliers: tuple = (1, 2)
    resolutions: tuple[int, ...] = (16,)
    span: tuple[float, float] = (0.0, 1.0)
    scale: float | None = None
    dtype: str = "float32"


@dataclass(frozen=True, kw_only=True)
class Rates:
    learning_rate: float = 1.0

    def __post_init__(self):
        if self.learning_rate < 0:
            raise ValueError(f"learning_rate is {self.learning_rate}; it must not be negative")


@dataclass(frozen=True, kw_only=True)
class Stage:
    module: Net = Net()
    optimizer: Rates = Rates()
    steps: int = 10
    parts: int = 5
    learned: bool = False
    earlier: Net | None = field(default=None, metadata={"attached": True})

    def __post_init__(self):
        if self.steps % self.parts:
            raise ValueError(f"{self.steps} steps do not divide into {self.parts} parts")


@dataclass(frozen=True, kw_only=True)
class Whole:
    name: str = "whole"
    size: int | None = None
    stages: dict[str, Stage] = field(default_factory=lambda: {"prior": Stage(), "decoder": Stage()})


def change(*overrides: str) -> Whole:
    return apply_overrides(Whole(), overrides)


@pytest.mark.parametrize(
    ("override", "found"),
    [
        ("decoder.steps=20", 20),
        ("decoder.steps=20_000", 20000),
        ("decoder.optimizer.learning_rate=1e-4", 1e-4),
        ("decoder.optimizer.learning_rate=3", 3.0),
        ("decoder.learned=true", True),
        ("decoder.learned=False", False),
        ("decoder.module.multipliers=1,2,2", (1, 2, 2)),
        ("decoder.module.resolutions=8", (8,)),
        ("decoder.module.resolutions=", ()),
        ("decoder.module.span=0.5,2", (0.5, 2.0)),
        ("decoder.module.scale=2", 2.0),
        ("decoder.module.scale=None", None),
        ("decoder.module.dtype=bfloat16", "bfloat16"),
    ],
)
def test_values(override, found):
    value = change(override).stages["decoder"]
    for name in override.partition("=")[0].split(".")[1:]:
        value = getattr(value, name)
    assert value == found and type(value) is type(found)


def test_only_the_named_field_changes():
    changed = change("decoder.module.channels=8", "stages.prior.steps=15", "name=a=b", "size=4")
    assert changed.name == "a=b" and changed.size == 4
    assert changed.stages["prior"] == dataclasses.replace(Stage(), steps=15)
    assert changed.stages["decoder"] == dataclasses.replace(Stage(), module=Net(channels=8))
    assert Whole().stages["decoder"].module.channels == 3


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("decodr.steps=1", "did you mean 'decoder.steps'"),
        ("decoder.modul.channels=1", "did you mean 'decoder.module.channels'"),
        ("decoder.module.chanels=1", "did you mean 'decoder.module.channels'"),
        ("decoder.learning_rate=1", "did you mean 'decoder.optimizer.learning_rate'"),
        ("zzz=1", "there is no field 'zzz'; the nearest is '"),
        ("decoder.steps=12", "12 steps do not divide into 5 parts"),
        ("decoder.earlier=1", "no field 'decoder.earlier'"),
        ("decoder.steps=1.5", "decoder.steps takes a whole number, not '1.5'"),
        ("decoder.steps=", "takes a whole number"),
        ("decoder.learned=1", "takes true or false, not '1'"),
        ("decoder.optimizer.learning_rate=fast", "takes a number, not 'fast'"),
        ("decoder.module.scale=x", "takes a number or None"),
        ("decoder.module.resolutions=8,x", "each a whole number"),
        ("decoder.module.span=1", "2 values"),
        ("decoder.module=3", "set its fields"),
        ("decoder.steps.more=3", "goes on past a value"),
        ("decoder.steps", "path.to.field=value"),
        ("decoder.optimizer.learning_rate=-1", "must not be negative"),
    ],
)
def test_sentences(override, sentence):
    with pytest.raises(ValueError, match=sentence) as raised:
        change(override)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "overrides", [("decoder.steps=12", "decoder.parts=4"), ("decoder.parts=4", "decoder.steps=12")]
)
def test_fields_that_must_fit_each_other_change_together(overrides):
    assert change(*overrides, "decoder.module.channels=4").stages["decoder"] == Stage(
        steps=12, parts=4, module=Net(channels=4)
    )


def test_the_last_of_a_path_counts():
    assert change("decoder.steps=20", "prior.steps=15", "decoder.steps=30").stages["decoder"].steps == 30


def test_all_paths():
    paths = list(all_paths(Whole()))
    assert "prior.module.channels" in paths and "decoder.optimizer.learning_rate" in paths and "name" in paths
    assert not any("earlier" in path or "parent" in path or path.startswith("stages") for path in paths)


def test_the_shapes_config():
    from configs.shapes import system

    whole = system()
    path = "decoder.module.unet.attention_resolutions"
    changed = apply_overrides(whole, [f"{path}=4", "prior.module.embedding_scale=17.2", "prior.process.clip=None"])
    assert changed.stages["decoder"].module.unet.attention_resolutions == (4,)
    assert changed.stages["prior"].module.embedding_scale == 17.2
    assert {"data.name", "clip.module.vision.width", "upsampler.low_size"} <= set(all_paths(whole))
