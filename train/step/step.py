"""One training step, compiled."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from dalle2_jax.layers.kernels.layout import row_major
from dalle2_jax.sharding import batch_sharding, keep_batch_split, replicate
from train.config.optimizer import learning_rate_schedule
from train.config.recipe import Task
from train.machine.compiler import compiler_options
from train.step.optimizer import accumulated_gradient, update_ema
from train.step.state import Metrics, State, shardings_of


def make_step(task: Task, mesh: Mesh, abstract: State) -> Callable[[State, Any, Any], tuple[State, Metrics]]:
    """The jitted `step(state, batch, frozen) -> (state, metrics)`; the state is donated.

    A loss or gradient that is not finite leaves parameters, optimizer and average as they are; the step is counted as
    skipped, and `metrics["skipped"]` is 1. "learning_rate" is that of `recipe.optimizer` after as many updates as there
    were, unless the task's own metrics say otherwise.
    """
    recipe, settings = task.recipe, task.recipe.optimizer
    optimizer = task.gradient_transformation()
    schedule = learning_rate_schedule(settings, recipe.steps)
    split = batch_sharding(mesh)

    def step(state: State, batch: Any, frozen: Any) -> tuple[State, Metrics]:
        batch = jax.lax.with_sharding_constraint(batch, split)
        key = jax.random.fold_in(state["key"], state["step"])

        def loss(params: Any, micro: Any, key: jax.Array, extra: Any) -> tuple[jax.Array, Metrics, Any]:
            with keep_batch_split(mesh, recipe.batch_size // settings.accumulation):
                return task.loss(params, micro, key, frozen, extra)

        value, metrics, gradient, extra = accumulated_gradient(
            loss, state["params"], batch, key, state.get("extra"), settings.accumulation
        )
        norm = optax.tree.norm(gradient).astype(jnp.float32)
        finite = jnp.isfinite(value) & jnp.isfinite(norm)
        gradient = jax.tree.map(lambda g: row_major(g) if g.ndim == 4 else g, gradient)
        changes, optimizer_state = optimizer.update(gradient, state["optimizer"], state["params"])
        params = optax.apply_updates(state["params"], changes)
        updates = state["step"] - state["skipped"]
        new = {"params": params, "ema": update_ema(state["ema"], params, updates, settings.ema_decay)}
        new["optimizer"] = optimizer_state
        if "extra" in state:
            new["extra"] = extra
        old = {name: state[name] for name in new}
        kept = jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, old)
        skipped = jnp.where(finite, 0, 1).astype(jnp.int32)
        counters = {"step": state["step"] + 1, "skipped": state["skipped"] + skipped, "key": state["key"]}
        report = {
            "learning_rate": schedule(updates),
            **metrics,
            **task.gradient_metrics(gradient),
            "loss": value,
            "gradient_norm": norm,
            "skipped": skipped,
        }
        return {**kept, **counters}, report

    return jax.jit(
        step,
        donate_argnums=0,
        out_shardings=(shardings_of(abstract), replicate(mesh)),
        compiler_options=compiler_options(task.module, mesh.abstract_mesh.abstract_device.platform),
    )
