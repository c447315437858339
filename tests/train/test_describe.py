"""`python -m train describe`: the right figures from shapes alone, refusals as sentences."""

import dataclasses
import importlib.util
import math
from types import SimpleNamespace

import jax
import pytest

from configs import paper, shapes
from dalle2_jax.data.dataset import Data
from dalle2_jax.sharding import make_mesh
from tests.cascade import tiny_system
from tests.train.toy import SIZE, ToyNet, toy_recipe
from train import __main__ as command
from train import describe as describing
from train.config.overrides import apply_overrides
from train.config.system import System
from train.describe import describe, examine
from train.machine import backend
from train.run.plan import plan
from train.step.topology import UNTUNED, Needs, compile_step, count_collectives, what_is_too_much

FEATURES = SIZE * SIZE * 3


def toy_system(**recipe) -> System:
    data = Data(image_size=SIZE, counts=(64, 32, 8, 8))
    stages = {"toy": toy_recipe(**recipe)}
    return System(name="toy", data=data, vocabulary_size=300, context_length=2, stages=stages)


def only(system: System, *names: str) -> System:
    return dataclasses.replace(system, stages={name: system.stages[name] for name in names})


def test_figures_of_a_small_stage(capsys):
    assert describe(toy_system(module=ToyNet(width=16), steps=100, batch_size=16)) == 0
    output = capsys.readouterr().out
    hidden, out = FEATURES * 16 + 16, 16 * FEATURES + FEATURES
    row = next(line for line in output.splitlines() if line.startswith("toy  ")).split("  ")
    row = [cell.strip() for cell in row if cell.strip()]
    # The first layer's input needs no gradient: five products of equal size.
    products = 5 * 2 * 16 * FEATURES * 16
    state = f"{(5 * 4 * (hidden + out) + 2 * 4) / 1024:.1f} KiB"  # with the optimizer's two counters
    assert row[:3] == ["toy", f"{hidden + out:,}", "100 x 16"]
    forward = 2 * 2 * FEATURES * 16
    assert row[3:6] == [f"{forward:.2e}", f"{products / 16:.2e}", f"{100 * products:.2e}"]
    assert row[6] == state and row[8] == "?", "a CPU has no memory of its own"
    assert f"out {out:,}, hidden {hidden:,}" in output and "estimate" in output and "--topology" in output


def test_memory_is_what_one_device_holds():
    wide = toy_system(module=ToyNet(width=4096), batch_size=32)
    whole, split = (examine(wide, make_mesh(fsdp=fsdp))[0][0].memory for fsdp in (1, 8))
    kernels, vectors = 4 * 2 * FEATURES * 4096, 4 * (FEATURES + 4096)
    assert whole["parameters"] == whole["average"] == whole["gradients"] == kernels + vectors
    # Adam's two moments, and its and the schedule's counts.
    assert 0 < whole["optimizer"] - 2 * (kernels + vectors) <= 16
    assert split["parameters"] == split["average"] == split["gradients"] == kernels // 8 + vectors
    accumulated = toy_system(module=ToyNet(width=4096), batch_size=32, optimizer={"accumulation": 2})
    assert examine(accumulated, make_mesh())[0][0].memory["gradients"] == 2 * (kernels + vectors)


def test_activations_are_what_the_backward_pass_needs():
    wide = examine(toy_system(module=ToyNet(width=4096), batch_size=32), make_mesh())[0][0]
    # The noisy image, the hidden units before and after the ReLU (or its sign), and the error.
    least, most = 4 * (FEATURES + 4096), 4 * (3 * FEATURES + 2 * 4096) + 4096
    assert least <= wide.activations <= most
    room = 10 * 8 * wide.activations
    assert wide.largest_batch(wide.state + room // 8, 8) == 80 and wide.largest_batch(wide.state - 1, 8) == 0


def test_one_stage_alone(capsys):
    assert describe(tiny_system("unused"), ["prior"], mesh={"fsdp": 4, "tensor": 2}) == 0
    output = capsys.readouterr().out
    assert [row[0] for row in _table_rows(output)] == ["prior"]
    assert "8 x cpu: 1 copy of the state, split over 8 devices, 2 of which share each example" in output


@pytest.mark.parametrize(
    ("message", "sentence"),
    [
        (
            "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (55.52G) "
            "exceeds available HBM (15.75G).",
            "its temporaries alone need 55.5 GiB of 15.8 GiB",
        ),
        (
            "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 80.00G of 15.75G hbm. Exceeded hbm "
            "capacity by 64.25G.",
            "needs 80.0 GiB of 15.8 GiB",
        ),
        ("RESOURCE_EXHAUSTED: something else\nand more", "RESOURCE_EXHAUSTED: something else"),
    ],
)
def test_the_compilers_words_for_too_much(message, sentence):
    assert what_is_too_much(message) == sentence


def test_every_stage_of_a_config(capsys):
    system = only(shapes.system(), "clip", "prior")
    assert describe(system) == 0
    output = capsys.readouterr().out
    counts = []
    for stage in plan(system):
        counts.append(sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(stage.params)))
    rows = _table_rows(output)
    assert [row[:2] for row in rows] == [["clip", f"{counts[0]:,}"], ["prior", f"{counts[1]:,}"]]
    assert f"frozen {counts[0]:,}" in output, "the prior is trained on a frozen CLIP"


def _table_rows(output: str) -> list[list[str]]:
    lines = output.splitlines()
    start = next(index for index, line in enumerate(lines) if line.startswith("stage "))
    return [line.split() for line in lines[start + 1 : lines.index("", start)]]


def test_the_paper_prior_takes_the_expected_operations():
    stages, refused = examine(only(paper.system(), "clip", "prior"), make_mesh())
    prior = stages[1]
    assert not refused and prior.frozen == stages[0].parameters
    # Of the last layer, queries, keys and values alone are those of every token.
    blocks, tokens = (12 * 23 + 3) * 2048**2, 256 + 4
    # Six operations a parameter and token, and four thirds for what remat computes again: a block's last product, a
    # third of its weights, is not needed again. Two a parameter and token for the frozen CLIP.
    own = (6 + 4 / 3) * blocks * tokens
    frozen = 2 * (12 * 32 * 1280**2 * 257 + 12 * 24 * 1024**2 * 256)
    assert prior.training == pytest.approx(own + frozen, rel=0.06)
    assert prior.forward == pytest.approx(2 * blocks * tokens + frozen, rel=0.06)
    # What remat keeps: the states before each block, in bfloat16, and little beside them.
    assert prior.activations == pytest.approx(2 * 24 * tokens * 2048, rel=0.1)
    assert prior.memory["frozen"] == 4 * stages[0].parameters


def test_a_refused_stage_is_a_sentence_and_the_others_are_described(capsys):
    system = apply_overrides(only(shapes.system(), "clip", "prior"), ["prior.module.embedding_size=48"])
    assert describe(system) == 2
    output = capsys.readouterr().out
    assert "prior: refused: the prior predicts embeddings of size 48" in output
    assert [row[0] for row in _table_rows(output)] == ["clip"]
    stages, refused = examine(apply_overrides(system, ["clip.module.vision.patch_size=5"]), make_mesh())
    assert not stages and list(refused) == ["clip", "prior"]
    assert "does not divide by patch size 5" in refused["clip"] and "kind 'clip'" in refused["prior"]
    stages, refused = examine(apply_overrides(only(system, "clip"), ["clip.batch_size=12"]), make_mesh())
    assert not stages and "12 does not divide over the 8 devices" in refused["clip"]


@pytest.mark.parametrize("name", ["banana", "v5e", "v5e:4", "V5E:4x4", "v5e:4x", "4x4", ""])
def test_a_wrong_topology(name):
    with pytest.raises(ValueError, match="is not of the form generation:shape; write it as v5e:4x4"):
        describe(toy_system(), topology=name)


def test_a_topology_without_libtpu(monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "libtpu" else found(name))
    with pytest.raises(ValueError, match=r'needs libtpu, which is not installed; run: pip install "jax\[tpu\]"'):
        describe(toy_system(), topology="v5e:4x4")


def test_the_command(monkeypatch, capsys):
    monkeypatch.setattr(backend, "setup", lambda *_: None)
    assert command.main(["describe", "configs/shapes.py", "--topology", "banana"]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: the topology 'banana'") and captured.err.count("\n") == 1
    assert not captured.out


def test_a_topology_of_gpus_that_is_wrong(monkeypatch, capsys):
    monkeypatch.setattr(backend, "setup", lambda *_: None)
    for name, words in (
        ("h300:8", "there is no chip 'h300'"),
        ("h200:0", "the topology 'h200:0' does not say how many"),
    ):
        assert command.main(["describe", "configs/shapes.py", "prior", "--topology", name]) == 2
        captured = capsys.readouterr()
        assert captured.err.startswith(f"error: {words}") and captured.err.count("\n") == 1
        assert not captured.out


class Lowered:
    """Stands for a lowered step; compiled it has 3 GiB of arguments of which 2 are given back, and 1 of temporaries."""

    def __init__(self, cost: dict[str, float] | None, text: str = ""):
        self.cost, self.text, self.shown_text = cost, text, []

    def compile(self, compiler_options: dict | None = None) -> "Lowered":
        config = jax.config
        self.shown_text.append(
            (compiler_options, config.jax_optimization_level, config.jax_persistent_cache_min_compile_time_secs)
        )
        return self

    def memory_analysis(self) -> SimpleNamespace:
        sizes = {"argument": 3, "output": 2, "alias": 2, "temp": 1}
        return SimpleNamespace(**{f"{name}_size_in_bytes": size * 2**30 for name, size in sizes.items()})

    def cost_analysis(self) -> dict[str, float] | None:
        return self.cost

    def as_text(self) -> str:
        return self.text


@pytest.mark.parametrize("cost", [None, {}])
def test_a_compiler_that_counts_no_operations(cost):
    needs = compile_step(Lowered(cost), "gpu")
    assert needs.flops is None and needs.bytes_accessed is None and needs.needed == 4 * 2**30
    counted = compile_step(Lowered({"flops": 5.0, "bytes accessed": 7.0}), "tpu")
    assert (counted.flops, counted.bytes_accessed) == (5.0, 7.0)


def test_what_a_compiler_is_told():
    def settings() -> tuple:
        return jax.config.jax_optimization_level, jax.config.jax_persistent_cache_min_compile_time_secs

    before = settings()
    gpu, tpu = Lowered(None), Lowered({})
    compile_step(gpu, "gpu")
    compile_step(tpu, "tpu")
    assert gpu.shown_text == [(UNTUNED, before[0], math.inf)], "what is compiled for no device is not kept"
    assert tpu.shown_text == [(None, "O1", before[1])]
    assert settings() == before


@pytest.mark.parametrize(
    ("message", "answer"),
    [
        ("RESOURCE_EXHAUSTED: Used 20.00G of 15.75G hbm.", "needs 20.0 GiB of 15.8 GiB"),
        ("RESOURCE_EXHAUSTED: Shared memory size limit exceeded: requested 131072, available: 101376", None),
        ("INTERNAL: something", None),
    ],
)
def test_what_a_compiler_raises(monkeypatch, message, answer):
    def refuse(*_, **__):
        raise jax.errors.JaxRuntimeError(message)

    monkeypatch.setattr(Lowered, "compile", refuse)
    if answer is not None:
        assert compile_step(Lowered(None), "tpu") == answer
        return
    with pytest.raises(jax.errors.JaxRuntimeError, match=message[:20]):
        compile_step(Lowered(None), "gpu")


def test_a_start_and_its_done_are_one_operation():
    gpu = """
      %all-gather-start.1 = (f32[2]{0}, f32[16]{0}) all-gather-start(%bitcast.1), channel_id=1
      %all-gather-done.1 = f32[16]{0} all-gather-done(%all-gather-start.1), metadata={scheduling_name="all-gather-done"}
      %reduce-scatter-start = ((f32[16]{0}), f32[2]{0}) reduce-scatter-start(%fusion), to_apply=%add
      ROOT %reduce-scatter-done = f32[2]{0} reduce-scatter-done(%reduce-scatter-start)
      %all-reduce-start = f32[] all-reduce-start(%all-gather-done.1), to_apply=%add
      %all-reduce-done = f32[] all-reduce-done(%all-reduce-start)
      %all-reduce.2 = f32[] all-reduce(%all-reduce-done), to_apply=%add
    """
    assert count_collectives(gpu) == {"all-gather": 1, "all-reduce": 2, "reduce-scatter": 1}
    assert count_collectives("%add = f32[] add(%x, %y)") == {}


@pytest.mark.parametrize(("gib", "verdict"), [(4.0, "fits"), (3.9, "does not fit")])
def test_whether_it_fits_a_gpu_is_seen_by_what_it_needs(monkeypatch, capsys, gib, verdict):
    """XLA for a GPU compiles what does not fit, too."""
    needs = Needs({"arguments": 3 * 2**30, "temporaries": 2**30}, None, None, {"all-gather": 2})
    monkeypatch.setattr(describing, "topology_mesh", lambda *_: make_mesh(fsdp=8))
    monkeypatch.setattr(describing, "device_memory", lambda _: int(gib * 2**30))
    monkeypatch.setattr(describing, "compile_step", lambda *_: needs)
    assert describe(toy_system(batch_size=16), topology="h200:8") == (verdict != "fits")
    output = capsys.readouterr().out
    assert f"  {verdict}: a device needs 4.0 GiB of {gib:.1f} GiB (arguments 3.0 GiB, temporaries 1.0 GiB)" in output
    assert "FLOPs a step\n" in output and "nan" not in output and "XLA's own count" not in output
    assert "2 all-gather operations between devices" in output


@pytest.mark.slow
@pytest.mark.parametrize("topology", ["h200:2", "a100:2x1", "h100:1", "b200:2"])
def test_compiling_for_gpus(capsys, topology):
    pytest.importorskip("jax_cuda13_plugin")
    assert describe(toy_system(module=ToyNet(width=4096), batch_size=16), topology=topology) == 0
    output = capsys.readouterr().out
    memory = {"h200": "138.0", "a100": "78.0", "h100": "78.0", "b200": "177.0"}[topology.partition(":")[0]]
    assert "fits: a device needs" in output and f"of {memory} GiB (arguments" in output and "nan" not in output
    assert ("all-gather" in output) == (topology != "h100:1")


@pytest.mark.slow
def test_what_does_not_fit_gpus(capsys):
    pytest.importorskip("jax_cuda13_plugin")
    # Its state is 121 GiB and its gradients are in the table; the step needs more than there is.
    huge = toy_system(module=ToyNet(width=2**26), batch_size=512)
    assert describe(huge, topology="h200:2", mesh={"data": 2}) == 1
    output = capsys.readouterr().out
    assert "toy: compiling" in output and "  does not fit: a device needs" in output


@pytest.mark.slow
def test_compiling_for_a_topology(capsys):
    pytest.importorskip("libtpu")
    with pytest.raises(ValueError, match="libtpu knows no topology 'v9z:4x4'"):
        describe(toy_system(), topology="v9z:4x4")
    assert describe(toy_system(), topology="v5e:2x2") == 0
    output = capsys.readouterr().out
    assert "fits: a device needs" in output and "of 15.8 GiB (arguments" in output
    huge = toy_system(module=ToyNet(width=2**26))
    assert describe(huge, topology="v5e:2x2", mesh={"data": 4}) == 1
    assert "toy: does not fit: its state alone needs 121.3 GiB of 15.8 GiB" in capsys.readouterr().out


@pytest.mark.slow
def test_the_whole_paper(capsys):
    assert describe(paper.system()) == 0
    rows = _table_rows(capsys.readouterr().out)
    names = ["clip", "prior", "decoder", "upsampler", "upsampler_1024", "autoregressive_prior"]
    assert [row[0] for row in rows] == names
    counts = [int(row[1].replace(",", "")) for row in rows]
    assert counts[2:5] == [pytest.approx(value, rel=0.01) for value in (3.55e9, 691.6e6, 267.1e6)]
