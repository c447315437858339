"""A run's folder: its stages in the order in which they work, how far each one is, and which of them reads captions."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Protocol, TypeVar

from dalle2_jax.checkpoint.errors import CheckpointError
from dalle2_jax.checkpoint.record import STAGE_FILE, StageRecord, has_record, read_record
from dalle2_jax.checkpoint.stage import LoadedStage, load_stage, stage_version
from dalle2_jax.checkpoint.store import checkpoint_steps
from dalle2_jax.errors import InputError


@dataclass(frozen=True)
class Kind:
    """What stages of one kind do in a run. only: whether a run has one of them at most."""

    does: str
    only: bool = True


# In the order in which they work. Stages of other kinds stand behind them.
KINDS = {
    "clip": Kind("encodes captions and images"),
    "prior": Kind("samples image embeddings of captions"),
    "decoder": Kind("samples images"),
    "upsampler": Kind("upsamples images", only=False),
    # The systems that led to DALL-E 2, each of which works alone; DALL-E 1 on its dVAE.
    "gan": Kind("samples images", only=False),
    "autoencoder": Kind("encodes images as vectors", only=False),
    "vae": Kind("samples images", only=False),
    "ddpm": Kind("samples images", only=False),
    "encoder_decoder": Kind("translates sequences", only=False),
    "dvae": Kind("encodes images as codes"),
    "dalle1": Kind("samples the codes of captions", only=False),
}
CASCADE = ("clip", "prior", "decoder", "upsampler")  # the kinds of which DALL-E 2 is made


class HasKind(Protocol):
    """A stage, its record or its folder."""

    @property
    def kind(self) -> str: ...


Stage = TypeVar("Stage", bound=HasKind)


def of_kind(stages: Iterable[Stage], kind: str) -> tuple[Stage, ...]:
    """Those of the stages that are of one kind."""
    return tuple(stage for stage in stages if stage.kind == kind)


def first_of_kind(stages: Iterable[Stage], kind: str) -> Stage | None:
    """The first of the stages that is of a kind; None where there is none."""
    return next(iter(of_kind(stages, kind)), None)


def require(stages: Iterable[LoadedStage], *kinds: str) -> None:
    """Raises InputError if there is no stage of one of the kinds."""
    stages = list(stages)
    for kind in kinds:
        if not of_kind(stages, kind):
            names = ", ".join(stage.name for stage in stages)
            raise InputError(f"this run has no {kind}, which {KINDS[kind].does}; its stages are: {names}")


class StageFolder:
    """One stage of a run, of which things are read when they are first asked for, and once."""

    def __init__(self, path: str | Path):
        self.path = Path(path)

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def kind(self) -> str:
        return self.record.kind

    @property
    def exists(self) -> bool:
        """Whether the folder is a stage's."""
        return has_record(self.path)

    @cached_property
    def record(self) -> StageRecord:
        """Raises CheckpointError where there is none, or a damaged one."""
        return read_record(self.path)

    @cached_property
    def step(self) -> int | None:
        """The step of the newest checkpoint; None where there is none."""
        return next(reversed(checkpoint_steps(self.path)), None)

    @cached_property
    def version(self) -> str | None:
        """The version of the newest checkpoint (`LoadedStage.version`); None where there is none."""
        return None if self.step is None else stage_version(self.path, self.step)

    def is_finished(self, steps: int = 0) -> bool:
        """Whether it is trained to its end, which is at `steps` or later, and its checkpoint is there."""
        return self.step is not None and self.step >= steps and self.record.finished

    def load(self, ema: bool = True) -> LoadedStage:
        """See `load_stage`."""
        return load_stage(self.path, ema)


class Run:
    """A run's folder, which need not be there yet. What is read of a stage is read once; make a new one to look again.

    run = Run("runs/demo")
    run.stage("decoder").is_finished()
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self._folders: dict[str, StageFolder] = {}

    def stage(self, name: str) -> StageFolder:
        """The folder of a stage, which need not be there."""
        return self._folders.setdefault(name, StageFolder(self.path / name))

    @cached_property
    def stages(self) -> tuple[StageFolder, ...]:
        """Those that there are, in the order in which they work.

        Raises:
            CheckpointError: if there is none, or one is damaged.
        """
        names = sorted(path.parent.name for path in self.path.glob(f"*/{STAGE_FILE}"))
        if not names:
            raise CheckpointError(
                f"there is no trained stage in {self.path}; train one with `python -m train configs/shapes.py all`"
            )
        return tuple(sorted(map(self.stage, names), key=_place))

    def __iter__(self) -> Iterator[StageFolder]:
        return iter(self.stages)

    @property
    def caption_reader(self) -> StageFolder:
        """The stage with whose tokenizer captions are read: CLIP, or without one the first that has any.

        Raises:
            CheckpointError: if no stage reads captions.
        """
        readers = [stage for stage in self.stages if stage.record.tokenizer is not None]
        if not readers:
            names = ", ".join(stage.name for stage in self.stages)
            raise CheckpointError(f"{self.path} has no stage that reads captions; its stages are: {names}")
        return first_of_kind(readers, "clip") or readers[0]


def _place(stage: StageFolder) -> tuple[int, int, str]:
    order = list(KINDS)
    place = order.index(stage.kind) if stage.kind in KINDS else len(order)
    return place, stage.record.image_size or 0, stage.name
