"""What a stage compiles: its training step, and the task's functions that are called between steps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
from jax.sharding import Mesh

from dalle2_jax.sharding import replicate
from train.config.recipe import Task
from train.step.state import State
from train.step.step import make_step


@dataclass(frozen=True)
class Programs:
    """Jitted functions: `step(state, batch, frozen)`, the others `(params, batch, key, frozen)`."""

    step: Callable[..., Any]
    validate: Callable[..., Any]
    preview: Callable[..., Any]
    measure: Callable[..., Any]


def make_programs(task: Task, mesh: Mesh, abstract: State) -> Programs:
    """The jitted functions of a task; each is compiled when it is first called."""
    others = (task.validate, task.preview, task.measure)
    return Programs(make_step(task, mesh, abstract), *(jax.jit(f, out_shardings=replicate(mesh)) for f in others))
