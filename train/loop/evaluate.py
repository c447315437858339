"""What is seen of a stage while it trains: validation on held-out batches, previews of them, measures at the end."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from dalle2_jax.images.files import save_png
from dalle2_jax.images.sheet import caption_grid
from dalle2_jax.sharding import batch_parts, batch_sharding, own_rows, processes, put_batch_on_devices, replicate
from train.config.recipe import Recipe
from train.loop.clock import mean_of
from train.loop.metrics import MetricsWriter, is_recorded
from train.step.programs import Programs

VALIDATION_SEED, PREVIEW_SEED, MEASURE_SEED = 1, 2, 3
# What of a batch has one entry a row.
ROWS = (np.ndarray, jax.Array, list, tuple)
PREVIEW_COLUMNS = {"average": "ema", "raw": "params"}


class Evaluator:
    """Validates, previews and measures one stage by its compiled functions.

    batches: fixed held-out batches, this process's rows of them; the first one's images are also the preview's.
    """

    def __init__(
        self,
        name: str,
        recipe: Recipe,
        directory: Path,
        mesh: Mesh,
        programs: Programs,
        batches: Sequence[Mapping[str, Any]],
        log: Callable[[str], None],
    ):
        self.name, self.recipe, self.directory, self.mesh, self.programs = name, recipe, directory, mesh, programs
        self.log = log
        self.batches = [put_batch_on_devices(batch, batch_sharding(mesh)) for batch in batches]
        self.preview_rows = dict(batches[0]) if batches else None

    def done_at(self, step: int) -> tuple[bool, bool]:
        """Whether what is due at `step` was validated, and previewed, before a stop or a kill."""
        recorded = [is_recorded(self.directory, step, "validation"), self._sheet(step).is_file()]
        return tuple(processes.of_first(lambda: recorded))

    def run(
        self,
        step: int,
        state: Any,
        frozen: Any,
        metrics: MetricsWriter,
        validated: bool = False,
        previewed: bool = False,
    ) -> None:
        """The validation and the preview that are due after `step`, but for those done already."""
        recipe, ended = self.recipe, step >= self.recipe.steps
        if recipe.validate_every and (ended or step % recipe.validate_every == 0) and not validated:
            self._validate(step, state["ema"], frozen, metrics)
        if recipe.preview_every and (ended or step % recipe.preview_every == 0) and not previewed:
            self._preview(step, state, frozen, metrics)

    def _validate(self, step: int, ema: Any, frozen: Any, metrics: MetricsWriter) -> None:
        found = self._over_batches(self.programs.validate, VALIDATION_SEED, ema, frozen)
        if not found:
            return
        values = mean_of(found)
        numbers = " | ".join(f"{name} {value:.4f}" for name, value in values.items())
        self.log(f"{self.name} {step}/{self.recipe.steps} | validation | {numbers}")
        metrics.write(step, "validation", values)

    def measure(self, ema: Any, frozen: Any) -> dict[str, Any]:
        """The means over the held-out batches of what the task measures in the end."""
        found = self._over_batches(self.programs.measure, MEASURE_SEED, ema, frozen)
        means = jax.tree.map(lambda *values: np.mean(values, axis=0), *found) if found else {}
        return {name: value.tolist() for name, value in means.items()}

    def _over_batches(self, program: Callable[..., Any], seed: int, ema: Any, frozen: Any) -> list[dict[str, Any]]:
        """What a program says of every held-out batch, on the host."""
        key = jax.random.key(seed)
        found = [
            program(ema, batch, jax.random.fold_in(key, index), frozen) for index, batch in enumerate(self.batches)
        ]
        return jax.device_get(found)

    def _preview(self, step: int, state: Any, frozen: Any, metrics: MetricsWriter) -> None:
        if self.preview_rows is None:
            return
        if jax.process_count() == 1:
            rows = _first_rows(self.preview_rows, self.recipe.preview_count)
            divides = len(rows["image"]) % batch_parts(self.mesh) == 0
            batch = put_batch_on_devices(rows, batch_sharding(self.mesh) if divides else replicate(self.mesh))
        else:
            rows, batch = self._shared_rows()
        count = min(len(rows["image"]), self.recipe.preview_count)
        key = jax.random.key(PREVIEW_SEED)
        sampled = {
            name: self.programs.preview(state[part], batch, key, frozen) for name, part in PREVIEW_COLUMNS.items()
        }
        if any(images is None for images in sampled.values()) or jax.process_index() != 0:
            return
        images = [rows["image"][:count], *(np.asarray(made)[:count] for made in sampled.values())]
        sheet = caption_grid(images, list(rows.get("captions", [""] * count))[:count], labels=("real", *sampled))
        save_png(self._sheet(step), sheet)
        metrics.image(step, "samples", np.asarray(sheet))

    def _sheet(self, step: int) -> Path:
        return self.directory / "samples" / f"step_{step}.png"

    def _shared_rows(self) -> tuple[dict[str, Any], dict[str, jax.Array]]:
        """The preview's rows on the host, of which every process holds some, and on the devices."""
        first = self.batches[0]
        batch = self._first_of(first)
        whole = self._whole(batch["image"])
        count = len(whole)
        own = own_rows(batch_sharding(self.mesh), len(first["image"]))[:count].tolist()
        pairs = processes.gather(list(zip(own, self.preview_rows.get("captions", ()), strict=False)))
        captions = {row: caption for own_pairs in pairs for row, caption in own_pairs}
        return {"image": np.asarray(whole), "captions": [captions.get(row, "") for row in range(count)]}, batch

    @functools.cached_property
    def _first_of(self) -> Callable[[Any], Any]:
        """Jitted: the first rows of a batch, of a number that divides over the mesh."""
        parts = batch_parts(self.mesh)
        count = -(-self.recipe.preview_count // parts) * parts
        return jax.jit(functools.partial(_first_rows, count=count), out_shardings=batch_sharding(self.mesh))

    @functools.cached_property
    def _whole(self) -> Callable[[Any], Any]:
        """Jitted: an array with all of it on every device."""
        return jax.jit(lambda image: image, out_shardings=replicate(self.mesh))


def _first_rows(batch: Mapping[str, Any], count: int) -> dict[str, Any]:
    return {name: value[:count] for name, value in batch.items() if isinstance(value, ROWS)}
