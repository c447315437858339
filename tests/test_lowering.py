"""Training steps as a GPU's compiler gets them, without one: which attention is asked for, and what is in float32."""

import pytest

from tests.lowering import DEVICES, analyse, traced_for
from tests.test_configs import system
from train.cascade import planned_stages, trace_step
from train.state import abstract_state

FORWARD, BACKWARD = "__cudnn$fmhaSoftmax", "__cudnn$fmhaSoftmaxBackward"
# cuDNN's attention in a step of configs/shapes.py for an accelerator, forward and backward; a scanned stack counts as
# one layer. Prior and decoder also run CLIP's two halves forward. The prior's last layer has one query and needs none;
# the decoder attends twice down, three times up on two levels, and once in the middle.
ATTENTION = {"clip": (2, 2), "prior": (2 + 1, 1), "decoder": (2 + 11, 11), "upsampler": (0, 0)}
# Small, or bound by their weights, where digits count: time and conditions, the last layers, CLIP's projections and
# similarities (a bare dot_general), the resizing of images.
FLOAT32 = r"time(_\d)?/dot_general|conv_out/|DiffusionPrior\)+/out/|_projection/dot_general|^dot_general$|resize"


@pytest.mark.parametrize("stage", ATTENTION)
def test_a_training_step_for_nvidia(stage):
    name = "shapes-accelerator"
    recipe, frozen = next(
        (recipe, frozen) for other, recipe, frozen, _ in planned_stages(system(name)) if other == stage
    )
    with traced_for(DEVICES["cuda"]) as mesh:
        traced = trace_step(system(name), recipe, abstract_state(recipe, mesh), frozen, mesh)
        program = analyse(traced.lower(lowering_platforms=("cuda",)))
    assert (program.kernels[FORWARD], program.kernels[BACKWARD]) == ATTENTION[stage]
    assert set(program.kernels) <= {FORWARD, BACKWARD}, "a mask was given to cuDNN as a bias"
    if stage != "clip":  # whose similarities and projections are in float32
        assert program.float32_products(FLOAT32) == []
