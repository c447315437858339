"""Operations of a training step, from its trace."""

from typing import Any

import jax

from dalle2_jax.layers.fields import without_remat
from dalle2_jax.layers.flops import count_flops
from train.config.recipe import Task
from train.step.optimizer import accumulated_gradient
from train.step.state import State


def model_flops(task: Task, step: Any, state: State, batch: Any, frozen: Any) -> int:
    """Operations that one training step needs, over the whole batch and all devices; the numerator of MFU.

    Counted are the forward and backward pass of the stage's own network and the forward pass of the frozen ones (CLIP's
    for the prior and the decoder). Not counted is what `remat` computes again: a network with it is traced once more,
    without. Otherwise the trace is that of the jitted `step`, which jit uses again when it compiles.

    The arguments of the step are arrays or their shapes.
    """
    module = without_remat(task.module)
    if module == task.module:
        return count_flops(step.trace(state, batch, frozen).jaxpr)
    plain = task.with_module(module)
    parts = task.recipe.optimizer.accumulation

    def gradient(state: State, batch: Any, frozen: Any) -> Any:
        def loss(params: Any, micro: Any, key: jax.Array, extra: Any) -> Any:
            return plain.loss(params, micro, key, frozen, extra)

        return accumulated_gradient(loss, state["params"], batch, state["key"], state.get("extra"), parts)

    return count_flops(jax.make_jaxpr(gradient)(state, batch, frozen))
