"""Every stage learns the same on every mesh, and goes on from one mesh to any other: 8 devices, dropout on."""

import dataclasses
import functools
from typing import Any

import jax
import numpy as np
import pytest

from dalle2_jax.checkpoint import CheckpointWriter, LoadedStage, restore_latest
from dalle2_jax.layers.fields import with_fields
from dalle2_jax.sharding import batch_sharding, make_mesh, partition
from tests.cascade import tiny_system
from train.run.record import stage_record
from train.step.lower import abstract_batch
from train.step.state import abstract_state, create_state
from train.step.step import make_step

STEPS, BATCH, BOUND = 20, 16, 1e-5
SPLIT_FROM = 256  # elements of a parameter, so that the small ones do not cost a file a device
STAGES = ("clip", "prior", "decoder", "upsampler", "autoregressive_prior")
MESHES = {"one device": {}, "data": {"data": 8}, "fsdp": {"fsdp": 8}, "all three": {"data": 2, "fsdp": 2, "tensor": 2}}
# Every mesh hands over to every other one once; a short one leaves out copies of the whole model.
SHORT = ("one device", "fsdp", "one device", "all three", "fsdp", "all three", "one device")
TOUR = ("one device", "data", "one device", "fsdp", "one device", "all three", "data", "fsdp", "data", "all three")
TOUR += ("fsdp", "all three", "one device")


def mesh_of(name: str) -> jax.sharding.Mesh:
    return make_mesh(**MESHES[name], devices=jax.devices()[: 1 if name == "one device" else 8])


class Trained:
    """A stage of the tiny cascade, with dropout, and its step on every mesh."""

    def __init__(self, stage: str):
        self.system = tiny_system("unused")
        planned: dict[str, LoadedStage] = {}
        needed = self.system.stages[stage].needs
        for name, recipe in self.system.stages.items():
            if name != stage and recipe.kind not in needed:
                continue
            recipe = dataclasses.replace(recipe, batch_size=BATCH, steps=STEPS, module=with_dropout(recipe.module))
            self.task = recipe.build({kind: planned[kind] for kind in recipe.needs})
            if name == stage:
                break
            params = jax.jit(self.task.init)(jax.random.key(5))
            planned[recipe.kind] = LoadedStage(recipe.module, params, stage_record(recipe, name))
        self.place = functools.cache(self._place)

    def _place(self, name: str) -> tuple[Any, Any, Any, Any]:
        """The abstract state, the step, the sharding of a batch and the frozen parameters on a mesh."""
        mesh = mesh_of(name)
        abstract = abstract_state(self.task, mesh, smallest=SPLIT_FROM)
        frozen = jax.device_put(self.task.frozen, partition(self.task.frozen, mesh, smallest=SPLIT_FROM))
        return abstract, make_step(self.task, mesh, abstract), batch_sharding(mesh), frozen

    def batch(self, step: int) -> dict[str, np.ndarray]:
        random = np.random.default_rng(step)
        shapes = abstract_batch(self.system, self.task, None)
        batch = {name: random.integers(0, 256, x.shape).astype(x.dtype) for name, x in shapes.items()}
        batch["mask"] = np.arange(self.system.context_length) < random.integers(1, 9, (BATCH, 1))
        return batch

    def start(self, mesh: str) -> Any:
        return create_state(self.task, self.place(mesh)[0], fitted=self.fitted)

    @functools.cached_property
    def fitted(self) -> dict[str, Any]:
        """What is computed from the data before the first step: on one device, so that all meshes have the same."""
        _, _, split, frozen = self.place("one device")
        batches = (jax.device_put(self.batch(number), split) for number in range(STEPS))
        return self.task.fit(batches, frozen, mesh_of("one device"), lambda line: None)

    def steps(self, mesh: str, state: Any, first: int, last: int) -> tuple[Any, list[float]]:
        """The state after the steps `first` to `last`, and their losses."""
        _, step, split, frozen = self.place(mesh)
        losses = []
        for number in range(first, last):
            state, report = step(state, jax.device_put(self.batch(number), split), frozen)
            losses.append(float(report["loss"]))
        return state, losses


def with_dropout(module: Any) -> Any:
    """The network with dropout wherever it knows of it."""
    return with_fields(module, dropout=0.2)


# A fixture of pytest's would be made anew whenever the order of the tests asks for another stage in between.
@functools.cache
def trained_stage(stage: str) -> Trained:
    return Trained(stage)


@functools.cache
def losses_alone(stage: str) -> list[float]:
    """The losses on one device."""
    trained = trained_stage(stage)
    return trained.steps("one device", trained.start("one device"), 0, STEPS)[1]


@pytest.fixture(params=STAGES)
def trained(request) -> Trained:
    return trained_stage(request.param)


@pytest.fixture
def alone(request, trained) -> list[float]:
    return losses_alone(request.node.callspec.params["trained"])


# Compiling a step for eight devices takes long: the other ways to split each stage are with the slow tests, and the
# prior's with its checkpoints below. (U-Nets themselves are not split over `tensor`.)
SOON = {"clip": ("all three",), "prior": (), "decoder": ("fsdp",), "upsampler": (), "autoregressive_prior": ()}
LOSSES = [
    pytest.param(stage, mesh, marks=[] if mesh in SOON[stage] else [pytest.mark.slow])
    for stage in STAGES
    for mesh in MESHES
    if mesh != "one device"
]


@pytest.mark.parametrize(("trained", "mesh"), LOSSES, indirect=["trained"])
def test_losses_on_a_mesh(trained, alone, mesh):
    state, losses = trained.steps(mesh, trained.start(mesh), 0, STEPS)
    np.testing.assert_allclose(losses, alone, rtol=BOUND)
    assert len(set(losses)) == STEPS
    parts = {leaf.sharding.shard_shape(leaf.shape) != leaf.shape for leaf in jax.tree.leaves(state["params"])}
    assert (True in parts) == (mesh != "data"), "parameters are really split"


TOURS = [
    pytest.param(stage, tour, marks=[] if tour == SHORT else [pytest.mark.slow])
    for stage, tour in [("prior", SHORT), *((stage, TOUR) for stage in STAGES)]
]


@pytest.mark.parametrize(("trained", "tour"), TOURS, indirect=["trained"])
def test_checkpoints_go_from_every_mesh_to_every_other(trained, alone, tour, tmp_path):
    bounds = np.linspace(0, STEPS, len(tour) + 1).astype(int)
    state, losses = trained.start(tour[0]), []
    for place, (mesh, first, last) in enumerate(zip(tour, bounds, bounds[1:], strict=False)):
        if place:
            state = restore_latest(tmp_path, trained.place(mesh)[0]).state
        state, found = trained.steps(mesh, state, first, last)
        losses += found
        with CheckpointWriter(tmp_path) as writer:
            writer.save(int(last), state, iterator=None, metadata={})
    assert {*zip(tour, tour[1:], strict=False)} == {(a, b) for a in tour for b in tour if a != b}
    np.testing.assert_allclose(losses, alone, rtol=BOUND)
