"""Training in several processes over loopback, each with some CPU devices: by the command line, or by `train` below.

`do` does several jobs in one start, each of them one training of a small system on a mesh of its own.
"""

import contextlib
import dataclasses
import functools
import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from dalle2_jax.data import Data
from dalle2_jax.sharding import make_mesh
from tests import cascade as tiny
from tests.train.toy import ToyRecipe, ToyTask, toy_recipe
from train.config.system import System
from train.loop.loop import LoopOptions
from train.machine import hosts
from train.run import cascade

ROOT = Path(__file__).resolve().parents[2]


class DropNet(nn.Module):
    """[b, d] -> [b, d], with dropout between its two layers."""

    width: int = 16
    features: int = 48

    @nn.compact
    def __call__(self, x: jax.Array, deterministic: bool = True) -> jax.Array:
        x = nn.relu(nn.Dense(self.width, name="hidden")(x))
        return nn.Dense(self.features, name="out")(nn.Dropout(0.3)(x, deterministic=deterministic))


class DropRecipe(ToyRecipe):
    """The toy with dropout, which is drawn by a row's place in the batch, as its noise is."""

    def build(self, stages: Any) -> "DropTask":
        return DropTask(recipe=self)


class DropTask(ToyTask):
    """Its loss."""

    def loss(self, params: Any, batch: Any, key: jax.Array, frozen: Any, extra: Any = None):
        x = batch["image"].reshape(batch["image"].shape[0], -1).astype(jnp.float32) / 127.5 - 1.0
        noise, dropout = jax.random.split(key)
        noisy = x + self.recipe.noise * jax.random.normal(noise, x.shape)
        made = self.module.apply({"params": params}, noisy, False, rngs={"dropout": dropout})
        return jnp.mean((made - x) ** 2), {}, extra


def toy_system(steps: int, data_dir: Path | str, **changes: Any) -> System:
    """One stage with dropout on captioned_shapes of 4 px; a batch is 16 images."""
    recipe = toy_recipe(steps=steps, **{"checkpoint_every": 10, **changes})
    fields = {field.name: getattr(recipe, field.name) for field in dataclasses.fields(recipe)}
    return System(
        name="toy",
        data=Data(image_size=4, counts=(64, 32, 8, 8), data_dir=str(data_dir)),
        vocabulary_size=300,
        context_length=40,
        stages={"toy": DropRecipe(**{**fields, "module": DropNet()})},
    )


def train(place: Path, run: str, steps: int = 20, mesh: dict[str, int] | None = None, system: str = "toy", **settings):
    """Trains the toy, or the whole tiny cascade, into `runs/run` below `place`; every parameter is split over fsdp.

    settings: `looks`, whether the toy is validated and previewed; `devices`, how many; others are the loop's options,
    `stop_after_steps` above all.
    """
    devices = jax.devices()[: settings.pop("devices", None)]
    if system == "toy":
        every = 10 if settings.pop("looks", False) else 0
        system = toy_system(steps, place / "data", validate_every=every, validation_batches=1, preview_every=every)
    else:
        system = tiny.tiny_system(place / "data")
        for name, recipe in system.stages.items():
            system = system.with_stage(name, dataclasses.replace(recipe, steps=steps, checkpoint_every=10))
    system = dataclasses.replace(system, smallest_split=1)
    mesh, options = make_mesh(**(mesh or {}), devices=devices), LoopOptions(**settings)
    names, place = system.usual_stages, place / "runs" / run
    return cascade.train_stages(system, names, place, mesh, command=tiny.COMMAND, options=options)


class Process:
    """One process that runs, and what it has said so far."""

    def __init__(self, command: Sequence[str], environment: dict[str, str]):
        self.said, self._spoke = "", threading.Condition()
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        self.popen = subprocess.Popen(command, cwd=ROOT, env={**os.environ, **environment}, **pipes)
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        for line in self.popen.stdout:
            with self._spoke:
                self.said += line
                self._spoke.notify_all()

    def wait_for(self, text: str, seconds: float = 120) -> None:
        """Returns when it has said `text`."""
        with self._spoke:
            came = self._spoke.wait_for(lambda: text in self.said, seconds)
        assert came, f"{text!r} never came:\n{self.said}"

    def end(self, seconds: float = 120) -> int:
        """Its exit code, when it has ended."""
        code = self.popen.wait(seconds)
        self._reader.join(10)
        return code

    def close(self) -> None:
        """Ends it, if it has not ended."""
        self.popen.kill()
        self.end()
        self.popen.stdout.close()


@contextlib.contextmanager
def running(commands: Sequence[Sequence[str]], environments: Sequence[dict[str, str]]) -> Iterator[list[Process]]:
    """The processes of these commands; none of them is left at the end."""
    with contextlib.ExitStack() as stack:
        started = []
        for command, environment in zip(commands, environments, strict=True):
            started.append(Process(command, environment))
            stack.callback(started[-1].close)
        yield started


def free_address() -> str:
    """A port of this machine that nobody listens at."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{probe.getsockname()[1]}"


def settings_of(place: Path, devices: int) -> dict[str, str]:
    """The environment of a process with so many CPU devices."""
    return {
        "DALLE2_DATA_DIR": str(place / "data"),
        "JAX_COMPILATION_CACHE_DIR": str(ROOT / ".cache" / "jax"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.5",
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": str(devices),
        "PYTHONUNBUFFERED": "1",
    }


def start(place: Path, arguments: Sequence[str | Path], runs: Sequence[Path] = (), **variables: str):
    """`python -m train` with these arguments in two processes of two devices; see `running`.

    runs: the runs folder of each.
    variables: of the environment, in the second process alone.
    """
    command = [sys.executable, "-m", "train", *map(str, arguments), "--coordinator", free_address(), "--processes", "2"]
    folders = runs or [place / "runs"] * 2
    commands = [[*command, "--process", str(index), "--runs-dir", str(folder)] for index, folder in enumerate(folders)]
    settings = settings_of(place, 2)
    return running(commands, [settings, {**settings, **variables}])


def do(place: Path, jobs: Sequence[dict[str, Any]], devices: Sequence[int] = (2, 2)) -> None:
    """Does the jobs, each the arguments of `train`, one after the other in several processes."""
    address, count = free_address(), len(devices)
    texts = [json.dumps([str(place), address, count, index, list(jobs)]) for index in range(count)]
    commands = [[sys.executable, "-c", "from tests.train.hosts import main; main()", text] for text in texts]
    with running(commands, [settings_of(place, count) for count in devices]) as started:
        for process in started:
            assert process.end(1800) == 0, process.said


def main() -> None:
    place, address, count, index, jobs = json.loads(sys.argv[1])
    hosts.join(hosts.Cluster(address, count, index))
    try:
        for job in jobs:
            hosts.watched(functools.partial(train, Path(place), **job))
    except BaseException as error:
        hosts.fail(error)
        raise
    hosts.leave(0)
