"""One stage trained before one's eyes, in a notebook: the loop's own steps, without a run's folder.

    training = start(system, "vae")
    for now in training.steps(every=100):
        show(now)                              # the loss so far and what the stage shows of its work
    images = sample_vae(key, training.module, training.params, 16)

What is trained so is the same as what `python -m train` trains, from the same seed on the same number of devices.
"""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from dalle2_jax.checkpoint import LoadedStage
from dalle2_jax.data.dataset import Data
from dalle2_jax.diffusion import Sampling
from dalle2_jax.errors import InputError
from dalle2_jax.layers.fields import with_fields
from dalle2_jax.sharding import batch_sharding, make_mesh, put_batch_on_devices
from train.config.optimizer import Optimizer
from train.config.recipe import Task
from train.config.system import System
from train.loop.clock import mean_of
from train.loop.evaluate import PREVIEW_SEED, VALIDATION_SEED
from train.run.feed import Feed
from train.run.init_from import initial_parameters
from train.run.record import stage_record
from train.step.programs import make_programs
from train.step.state import abstract_state, create_state

# Where this variable is set, a few steps of plain gradient descent of shallow networks on a few images, to see whether
# a notebook runs.
QUICK = "DALLE2_QUICK"
QUICK_STEPS, QUICK_COUNTS = 2, (64, 16, 16, 3)


class Training:
    """A stage, its state, and the numbers of its steps so far.

    Attributes:
        task: of `train.config.recipe`. step: how many are taken.
        history: {name of a metric: [(step, its mean over the steps since the entry before), ...]}.
        examples: held-out examples: "image" uint8 `[b, h, w, 3]`, "captions", and what the task reads of them.
    """

    def __init__(self, name: str, task: Task, feed: Feed):
        self.name, self.task, self.feed, self.step = name, task, feed, 0
        self.history: dict[str, list[tuple[int, float]]] = {}
        self._mesh = make_mesh(devices=jax.devices()[:1])
        abstract = abstract_state(task, self._mesh)
        self._programs = make_programs(task, self._mesh, abstract)
        self._batches = feed.training(task, self._mesh)
        self._frozen = jax.device_put(task.frozen)
        fitted = task.fit(self._fresh_batches(), self._frozen, self._mesh, feed.log)
        if task.recipe.init_from is not None:
            initial = initial_parameters(name, task, feed.tokenizer if task.recipe.reads_captions else None, feed.log)
        else:
            init_key, _ = jax.random.split(jax.random.key(task.recipe.seed))
            # By one program, where the training program has one a parameter, so that no device holds all of them.
            initial = jax.jit(task.init)(init_key)
        self._state = create_state(task, abstract, initial, fitted)
        held_out = feed.validation(task, self._mesh)
        if not held_out:
            data = feed.system.data
            raise InputError(
                f"the split {data.validation_split!r} of {data.name} has no images to look at; take another"
            )
        self.examples = held_out[0]

    @property
    def module(self) -> Any:
        """The network."""
        return self.task.module

    @property
    def params(self) -> Any:
        """The moving average of the parameters, from which one samples."""
        return self._state["ema"]

    @property
    def raw_params(self) -> Any:
        """The parameters themselves."""
        return self._state["params"]

    def steps(self, count: int | None = None, every: int = 50) -> Iterator[Training]:
        """Takes `count` steps (None: the recipe's), and comes up after each `every` of them and after the last."""
        last, reports = self.step + (self.task.recipe.steps if count is None else count), []
        while self.step < last:
            batch = self._put(next(self._batches))
            self._state, report = self._programs.step(self._state, batch, self._frozen)
            reports.append(report)
            self.step += 1
            if self.step % every == 0 or self.step == last:
                for name, mean in mean_of(jax.device_get(reports)).items():
                    self.history.setdefault(name, []).append((self.step, mean))
                reports = []
                yield self

    def validate(self) -> dict[str, float]:
        """The task's metrics on held-out examples, by the averaged parameters."""
        found = self._programs.validate(self.params, self._held_out(), jax.random.key(VALIDATION_SEED), self._frozen)
        return {name: float(value) for name, value in found.items()}

    def preview(self, count: int = 8) -> np.ndarray | None:
        """What the task shows of its work on the first held-out examples: uint8 `[count, h, w, 3]`, or None."""
        images = self._programs.preview(self.params, self._held_out(), jax.random.key(PREVIEW_SEED), self._frozen)
        return None if images is None else np.asarray(images)[:count]

    def loaded(self) -> LoadedStage:
        """The stage as later ones take it: start(system, "dalle1", {"dvae": training.loaded()})."""
        measured = self._programs.measure(self.params, self._held_out(), jax.random.key(0), self._frozen)
        record = dataclasses.replace(
            stage_record(self.task.recipe, self.name),
            measured={name: np.asarray(value).tolist() for name, value in measured.items()},
            data=self.feed.system.data,
            tokenizer=self.feed.tokenizer.to_json() if self.task.recipe.reads_captions else None,
        )
        return LoadedStage(self.module, jax.device_get(self.params), record)  # as those of `load_stage`: on no device

    def _fresh_batches(self) -> Iterator[dict[str, jax.Array]]:
        """Batches from the first on, of a source that is opened when the first one is asked for."""
        yield from map(self._put, self.feed.training(self.task, self._mesh))

    def _put(self, batch: Mapping[str, Any]) -> dict[str, jax.Array]:
        return put_batch_on_devices(batch, batch_sharding(self._mesh))

    def _held_out(self) -> dict[str, jax.Array]:
        return self._put(self.examples)


def start(system: System, name: str, stages: Mapping[str, LoadedStage] | None = None) -> Training:
    """A stage of a system at its first step. stages: the earlier ones that it is built on, by kind.

    Raises:
        InputError: for what is wrong with the system or its data.
    """
    if os.environ.get(QUICK):
        system = _quick(system, name)
    recipe, stages = system.stages[name], stages or {}
    task = recipe.build({kind: stages[kind] for kind in recipe.needs})
    feed = Feed(system, Path(os.devnull))
    feed.check(name, recipe)
    return Training(name, task, feed)


def _quick(system: System, name: str) -> System:
    data: Data = system.data
    if data.name == "captioned_shapes":
        data = dataclasses.replace(data, counts=QUICK_COUNTS)
    recipe = system.stages[name]
    changes = {"module": with_fields(recipe.module, depth=1, channel_multipliers=(1,))}
    if isinstance(getattr(recipe, "sampling", None), Sampling):
        changes["sampling"] = dataclasses.replace(recipe.sampling, steps="2")
    if hasattr(recipe, "codec_examples"):
        changes["codec_examples"] = QUICK_COUNTS[0]
    if hasattr(recipe, "discriminator_optimizer"):
        changes["discriminator_optimizer"] = None
    changes["optimizer"] = Optimizer(name="sgd", learning_rate=1e-3, momentum=0.0, gradient_clip=0.0)
    recipe = dataclasses.replace(recipe, steps=QUICK_STEPS, batch_size=8, validation_batches=1, **changes)
    return dataclasses.replace(system.with_stage(name, recipe), data=data)


def show(training: Training, metric: str = "loss", preview: bool = True) -> None:
    """The curve of a metric and the preview, in place of what this cell showed before; outside of Jupyter, nothing."""
    import matplotlib.pyplot as plt

    images = training.preview() if preview else None
    figure, axes = plt.subplots(1, 1 if images is None else 2, figsize=(10, 2.6), squeeze=False)
    steps, values = zip(*training.history[metric], strict=True)
    axes[0, 0].plot(steps, values)
    axes[0, 0].set(xlabel="step", ylabel=metric, title=f"{training.name}: {metric} {values[-1]:.4f}")
    if images is not None:
        axes[0, 1].imshow(np.concatenate(list(images), axis=1))
        axes[0, 1].axis("off")
    figure.tight_layout()
    if "IPython" in sys.modules:
        from IPython.display import clear_output, display

        clear_output(wait=True)
        display(figure)
    plt.close(figure)
