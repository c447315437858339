"""The loop as a whole, on a toy stage: logs, previews, resume, refusals."""

import dataclasses
import gzip
import json
import os
import re
import signal
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dalle2_jax.checkpoint import CheckpointError, checkpoint_steps, load_params, read_record
from dalle2_jax.sharding import make_mesh
from tests.train.toy import SIZE, ToyBatches, ToyNet, ToyRecipe, ToyTask, toy_recipe
from train.loop import evaluate, loop
from train.loop.clock import Clock, Speed, duration
from train.loop.loop import LoopOptions
from train.run.stage import run
from train.step.peaks import PEAKS
from train.step.programs import make_programs
from train.step.state import abstract_state


def train(folder: Path, recipe=None, *, poisoned=(), log=None, **settings):
    """Runs the toy on one device; returns the result and the printed lines."""
    lines: list[str] = []
    recipe = recipe or toy_recipe()
    batches = ToyBatches(recipe.batch_size, poisoned)
    settings = {
        "mesh": make_mesh(devices=jax.devices()[:1]),
        "validation": [next(ToyBatches(recipe.batch_size))],
        **settings,
    }
    names = {field.name for field in dataclasses.fields(LoopOptions)} & set(settings)
    options = LoopOptions(**{name: settings.pop(name) for name in names})
    place = {"stage_name": "toy", "stage_dir": folder, "batches": lambda: batches, "log": log or lines.append}
    result = run(recipe.build({}), **place, options=options, **settings)
    assert batches.closed or "is finished" in lines[-1]
    return result, lines


def records(folder: Path, kind="train") -> list[dict]:
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [record for record in found if record["kind"] == kind]


def assert_same_ending(a: Path, b: Path) -> None:
    assert records(a) == records(b)
    for ema in (True, False):
        jax.tree.map(np.testing.assert_array_equal, load_params(a, ema), load_params(b, ema))


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> Path:
    """The folder of a run of 12 steps that nothing disturbed."""
    folder = tmp_path_factory.mktemp("alone") / "toy"
    result, lines = train(folder)
    assert (result.step, result.finished, result.signal) == (12, True, None)
    assert lines[-1].startswith("toy is trained: 12 steps in")
    return folder


def test_loss_falls_and_every_step_is_recorded(alone):
    losses = [record["loss"] for record in records(alone)]
    assert [record["step"] for record in records(alone)] == list(range(1, 13))
    assert np.mean(losses[-3:]) < 0.7 * np.mean(losses[:3])
    assert checkpoint_steps(alone) == [10, 12]
    assert list(alone.glob("events.out.tfevents*"))


def test_the_stage_file(alone):
    info = read_record(alone)
    assert (info.stage, info.kind, info.finished, info.step) == ("toy", "toy", True, 12)
    assert info.module["fields"] == {"width": 16, "features": 48} and info.parameters == 48 * 16 + 16 + 16 * 48 + 48
    assert info.optimizer["learning_rate"] == 1e-2 and info.seconds > 0


def test_progress_line(tmp_path):
    _, lines = train(tmp_path, toy_recipe(steps=4, log_every=2, checkpoint_every=0))
    shown = [line for line in lines if line.startswith("toy 4/4 |")]
    assert len(shown) == 1
    pattern = r"toy 4/4 \| \S+ m?s/step \| \S+ images/s \| data \S+% \| loss 0\.\d{4} \| gradient \S+ \| 0:00 left"
    assert re.fullmatch(pattern, shown[0])
    # The line is the mean over its two steps.
    each = records(tmp_path)
    train(tmp_path / "each", toy_recipe(steps=4, checkpoint_every=0))
    single = records(tmp_path / "each")
    np.testing.assert_allclose(each[1]["loss"], (single[2]["loss"] + single[3]["loss"]) / 2, rtol=1e-6)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RemarkingTask(ToyTask):
    def gradient_metrics(self, gradient):
        return {"hidden_norm": jnp.sqrt(sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(gradient["hidden"])))}

    def remark(self, step, values):
        assert {"brightness", "loss"} <= set(values) and 0 < values["hidden_norm"] < values["gradient_norm"]
        return None if step == 1 else f"in the {'first' if step < 4 else 'second'} half"


@dataclasses.dataclass(frozen=True, kw_only=True)
class RemarkingRecipe(ToyRecipe):
    def build(self, stages):
        return RemarkingTask(recipe=self)


def test_a_remark_is_logged_once(tmp_path):
    """After the line that it is about, with its step."""
    _, lines = train(tmp_path, RemarkingRecipe(**vars(toy_recipe(steps=6, checkpoint_every=0))))
    remarks = [line for line in lines if "half" in line]
    assert remarks == ["toy 2/6 | in the first half", "toy 4/6 | in the second half"]
    assert [lines[lines.index(line) - 1].split(" |")[0] for line in remarks] == ["toy 2/6", "toy 4/6"]


def speeds(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "speed.jsonl").read_text().splitlines()]


def test_speed_is_recorded_beside_the_metrics(tmp_path, monkeypatch):
    recipe = toy_recipe(steps=6, log_every=2)
    monkeypatch.setitem(PEAKS, jax.devices()[0].device_kind, 1e9)
    _, lines = train(tmp_path, recipe, stop_after_steps=4)
    train(tmp_path, recipe)
    found = speeds(tmp_path)
    assert [(record["step"], record["kind"]) for record in found] == [(2, "speed"), (4, "speed"), (6, "speed")]
    products = 5 * 2 * 16 * (SIZE * SIZE * 3) * 16  # the first layer's input needs no gradient
    for record in found:
        seconds = record["seconds_per_step"]
        np.testing.assert_allclose(record["images_per_second"], 16 / seconds, rtol=1e-6)
        np.testing.assert_allclose(record["mfu"], products / seconds / 1e9, rtol=1e-6)
        assert 0 <= record["data_wait"] <= 1
    assert "| MFU " in [line for line in lines if line.startswith("toy 4/6 |")][0]


def test_slow_data_are_seen(tmp_path, monkeypatch):
    slow = ToyBatches.__next__

    def late(self):
        time.sleep(0.05)
        return slow(self)

    monkeypatch.setattr(ToyBatches, "__next__", late)
    train(tmp_path, toy_recipe(steps=4, log_every=3, checkpoint_every=0))
    record = speeds(tmp_path)[0]
    assert record["step"] == 3 and 0.5 < record["data_wait"] <= 1 and "mfu" not in record


def test_a_profile_of_some_steps(tmp_path):
    train(tmp_path, stop_after_steps=3)
    _, lines = train(tmp_path, profile=(2, 4))
    said = [line for line in lines if "are recorded" in line]
    assert len(said) == 1 and said[0].startswith("toy: steps 2 to 4 of this start are recorded")
    assert lines.index(said[0]) < lines.index([line for line in lines if line.startswith("toy 8/12")][0])
    (trace,) = (tmp_path / "profile").rglob("perfetto_trace.json.gz")
    assert str(trace) in said[0]
    events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    steps = {event["args"]["step_num"] for event in events if event.get("name") == "step"}
    assert steps == {"2", "3", "4"} and any(event.get("name") == "next batch" for event in events)
    assert list((tmp_path / "profile").rglob("*.xplane.pb"))


@pytest.mark.parametrize("ending", ["stops", "fails"])
def test_a_profile_ends_with_the_training(tmp_path, monkeypatch, ending):
    if ending == "fails":
        monkeypatch.setattr(loop, "MOST_SKIPPED", 3)
        with pytest.raises(ValueError, match="diverged"):
            train(tmp_path, poisoned=range(2, 40), profile=(3, 40))
    else:
        _, lines = train(tmp_path, stop_after_steps=4, profile=(3, 40))
        assert any("steps 3 to 4 of this start are recorded" in line for line in lines)
    assert len(list((tmp_path / "profile").rglob("perfetto_trace.json.gz"))) == 1
    with pytest.raises(RuntimeError, match="No profile started"):
        jax.profiler.stop_trace()


def test_too_few_steps_for_a_profile(tmp_path):
    _, lines = train(tmp_path, profile=(20, 25))
    assert "toy: nothing is recorded, training ended before step 20 of this start" in lines
    assert not (tmp_path / "profile").exists()


def test_finished_stays_finished(alone):
    before = {path: path.stat().st_mtime_ns for path in alone.rglob("*") if path.is_file()}
    result, lines = train(alone)
    assert result.finished and result.step == 12 and result.seconds == read_record(alone).seconds
    assert lines == [f"toy is finished: 12 steps in {duration(result.seconds)}"]
    assert before == {path: path.stat().st_mtime_ns for path in alone.rglob("*") if path.is_file()}


@pytest.mark.parametrize("stop_at", [5, 7])
def test_stopped_and_resumed_is_bit_equal(alone, tmp_path, stop_at):
    result, lines = train(tmp_path, stop_after_steps=stop_at)
    assert (result.step, result.finished, result.signal) == (stop_at, False, signal.SIGTERM)
    assert f"saved at step {stop_at} of 12" in lines[-1] and "goes on" in lines[-1]
    assert read_record(tmp_path).finished is False
    result, lines = train(tmp_path)
    assert result.finished and f"toy goes on from step {stop_at}" in lines
    assert_same_ending(alone, tmp_path)


def test_a_damaged_checkpoint_costs_only_the_steps_since_the_one_before(alone, tmp_path):
    train(tmp_path, stop_after_steps=7)
    assert checkpoint_steps(tmp_path) == [5, 7]
    path = max((tmp_path / "checkpoints" / "7" / "params" / "d").iterdir(), key=lambda p: p.stat().st_size)
    path.write_bytes(path.read_bytes()[:-10])
    _, lines = train(tmp_path)
    assert sum("damaged" in line and "going on from step 5" in line for line in lines) == 1
    assert_same_ending(alone, tmp_path)


def test_all_checkpoints_damaged(tmp_path):
    train(tmp_path, stop_after_steps=2)
    (tmp_path / "checkpoints" / "2" / "extras.json").write_text("{}")
    with pytest.raises(CheckpointError, match="no checkpoint is left"):
        train(tmp_path)


def test_more_steps_go_on(alone, tmp_path):
    train(tmp_path, toy_recipe(steps=8))
    result, lines = train(tmp_path, toy_recipe(steps=12))
    assert result.finished and any("steps was 8 and is 12" in line for line in lines)
    assert_same_ending(alone, tmp_path)


def test_seconds_add_up(tmp_path, monkeypatch):
    now = [100.0]
    monkeypatch.setattr("train.loop.clock.time.monotonic", lambda: now[0])

    def tick(_):
        now[0] += 1.0

    train(tmp_path, toy_recipe(steps=4), stop_after_steps=2, log=tick)
    first = read_record(tmp_path).seconds
    now[0] += 1000.0
    result, _ = train(tmp_path, toy_recipe(steps=4), log=tick)
    assert 1 <= first < result.seconds < 20 and read_record(tmp_path).seconds == result.seconds


def test_signals_save_and_stop(tmp_path):
    for number in (signal.SIGTERM, signal.SIGINT):
        before = signal.getsignal(number)

        def interrupt(line, number=number):
            if "toy 3/12" in line:
                os.kill(os.getpid(), number)

        result, _ = train(tmp_path / str(number), log=interrupt)
        assert (result.signal, result.finished) == (number, False)
        assert checkpoint_steps(tmp_path / str(number))[-1] == result.step == 4
        assert signal.getsignal(number) is before


def test_a_signal_at_the_last_step_is_not_lost(tmp_path):
    def interrupt(line):
        if "toy 12/12" in line:
            os.kill(os.getpid(), signal.SIGTERM)

    result, _ = train(tmp_path, log=interrupt)
    assert (result.step, result.finished, result.signal) == (12, True, signal.SIGTERM)
    assert read_record(tmp_path).finished


@pytest.mark.parametrize("stop_at", [2, 4])
def test_what_was_due_at_a_stop_is_made_up_for(tmp_path, stop_at):
    recipe = toy_recipe(steps=6, validate_every=2, preview_every=2)
    train(tmp_path / "alone", recipe)
    train(tmp_path / "stopped", recipe, stop_after_steps=stop_at)
    assert [record["step"] for record in records(tmp_path / "stopped", "validation")] == list(range(2, stop_at, 2))
    train(tmp_path / "stopped", recipe)
    assert (tmp_path / "alone" / "metrics.jsonl").read_text() == (tmp_path / "stopped" / "metrics.jsonl").read_text()
    for step in (2, 4, 6):
        sheets = [(tmp_path / run / "samples" / f"step_{step}.png").read_bytes() for run in ("alone", "stopped")]
        assert sheets[0] == sheets[1]


def test_skipped_steps_are_counted_and_said(tmp_path):
    result, lines = train(tmp_path, toy_recipe(steps=5), poisoned=(1, 3))
    assert result.finished and "| 2 skipped" in [line for line in lines if line.startswith("toy 5/5")][0]
    assert [record["skipped"] for record in records(tmp_path)] == [0, 1, 1, 2, 2]
    assert [record["loss"] is None for record in records(tmp_path)] == [False, True, False, True, False]


@pytest.mark.parametrize("log_every", [1, 1000])
def test_a_stage_that_only_skips_stops(tmp_path, monkeypatch, log_every):
    monkeypatch.setattr(loop, "MOST_SKIPPED", 6)
    with pytest.raises(ValueError, match="toy has diverged.*toy.optimizer.learning_rate"):
        train(tmp_path, toy_recipe(steps=40, log_every=log_every), poisoned=range(2, 40))
    assert checkpoint_steps(tmp_path)[0] == 5


def test_validation_and_previews(tmp_path):
    from PIL import Image

    recipe = toy_recipe(steps=6, validate_every=2, preview_every=3, preview_count=4)
    batches = ToyBatches(16)
    validation = [next(batches), next(batches)]
    _, lines = train(tmp_path, recipe, validation=validation)
    found = records(tmp_path, "validation")
    assert [record["step"] for record in found] == [2, 4, 6] and found[-1]["loss"] < found[0]["loss"]
    assert any("toy 6/6 | validation | loss 0." in line for line in lines)
    # By hand: the average's mean loss over the two batches, with the loop's own keys.
    key = jax.random.key(evaluate.VALIDATION_SEED)
    device = [{name: batch[name] for name in ("image", "tokens", "mask")} for batch in validation]
    by_hand = [
        recipe.build({}).validate(load_params(tmp_path), batch, jax.random.fold_in(key, index), {})["loss"]
        for index, batch in enumerate(device)
    ]
    np.testing.assert_allclose(found[-1]["loss"], np.mean(by_hand), rtol=1e-5)
    images = sorted(path.name for path in (tmp_path / "samples").iterdir())
    assert images == ["step_3.png", "step_6.png"]
    with Image.open(tmp_path / "samples" / "step_6.png") as grid:
        assert grid.height > 3 * 96 and grid.width > 4 * 96  # real, average and raw of four captions


def test_previews_and_validation_leave_the_training_alone(alone, tmp_path):
    train(tmp_path, toy_recipe(validate_every=1, preview_every=4))
    assert_same_ending(alone, tmp_path)


def test_frozen_parameters_reach_the_loss(tmp_path):
    class Scaled(ToyTask):
        def loss(self, params, batch, key, frozen, extra=None):
            loss, metrics, extra = super().loss(params, batch, key, frozen)
            return loss * frozen["clip"]["scale"], {**metrics, "scale": frozen["clip"]["scale"]}, extra

    class OnClip(ToyRecipe):
        def build(self, stages):
            return Scaled(recipe=self, frozen={"clip": {"scale": np.float32(3.0)}})

    train(tmp_path, OnClip(**vars(toy_recipe(steps=2))))
    assert [record["scale"] for record in records(tmp_path)] == [3.0, 3.0]


@pytest.mark.parametrize(
    ("recipe", "info", "sentence"),
    [
        (toy_recipe(module=ToyNet(width=32)), {}, "module.width is 16 there and 32 here.*--run"),
        (toy_recipe(), {"data": {"name": "emoji"}}, "data.name is 'shapes' there and 'emoji' here"),
        (toy_recipe(), {"built_on": {"clip": "other"}}, "another clip"),
    ],
)
def test_the_folder_of_another_stage_is_refused(tmp_path, recipe, info, sentence):
    first = {"data": {"name": "shapes"}, "built_on": {"clip": "first"}}
    train(tmp_path, info=first, stop_after_steps=2)
    with pytest.raises(ValueError, match=sentence):
        train(tmp_path, recipe, info={**first, **info})
    assert read_record(tmp_path).module["fields"]["width"] == 16 and checkpoint_steps(tmp_path) == [2]


def test_other_rates_are_allowed_and_logged(tmp_path):
    train(tmp_path, stop_after_steps=2)
    _, lines = train(tmp_path, toy_recipe(steps=3, optimizer={"learning_rate": 2e-3}))
    assert any("optimizer.learning_rate was 0.01 and is 0.002" in line for line in lines)
    np.testing.assert_allclose([record["learning_rate"] for record in records(tmp_path)], [5e-3, 1e-2, 2e-3], rtol=1e-6)


def test_a_batch_that_does_not_divide(tmp_path):
    with pytest.raises(ValueError, match="12 does not divide over the 8 devices"):
        train(tmp_path / "toy", toy_recipe(batch_size=12), mesh=make_mesh())
    assert not (tmp_path / "toy").exists()


def test_eight_devices_resume_what_one_began(alone, tmp_path):
    train(tmp_path, stop_after_steps=7)
    result, _ = train(tmp_path, mesh=make_mesh(fsdp=4), smallest_split=1)
    assert result.finished
    for a, b in zip(jax.tree.leaves(load_params(alone)), jax.tree.leaves(load_params(tmp_path)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


# The parts


@pytest.mark.parametrize(
    ("speed", "words"),
    [
        (Speed(0.1229, 1041.2, 0.0031, 0.412), ["123 ms/step", "1041 images/s", "MFU 41%", "data 0.3%"]),
        (Speed(2.5, 6.4, 0.317), ["2.50 s/step", "6.4 images/s", "data 32%"]),
        (Speed(0.0042, 3810.0, 0.0, 0.0123), ["4.2 ms/step", "3810 images/s", "MFU 1.2%", "data 0.0%"]),
    ],
)
def test_speed_in_words(speed, words):
    assert speed.words() == words


def test_durations():
    assert [duration(s) for s in (0, 7.4, 59.6, 754, 3723)] == ["0:00", "0:07", "1:00", "12:34", "1:02:03"]


def test_clock_leaves_out_compilation_and_pauses(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("train.loop.clock.time.monotonic", lambda: now[0])
    clock = Clock()
    now[0] = 50.0
    clock.compiled()
    now[0] = 54.0
    assert clock.lap(5) == (1.0, 0.0)  # four steps after the compiled one
    with clock.pause():
        now[0] = 154.0
    now[0] = 156.0
    assert clock.lap(4) == (0.5, 0.0) and clock.seconds() == 156.0


def test_clock_counts_a_wait_only_for_idle_devices(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("train.loop.clock.time.monotonic", lambda: now[0])
    clock = Clock()
    for idle in (True, False):  # compiling: none of it counts
        with clock.fetch(lambda idle=idle: idle):
            now[0] += 10.0
    clock.compiled()
    assert clock.lap(1) == (20.0, None)
    for idle in (True, False, True):
        with clock.fetch(lambda idle=idle: idle):
            now[0] += 1.0
        now[0] += 2.0
    assert clock.lap(3) == (3.0, 2 / 9)
    now[0] += 4.0
    assert clock.lap(2) == (2.0, 0.0)


def test_previews_of_several_processes_are_compiled_once(tmp_path, monkeypatch):
    """Cutting the preview's rows out of a batch that processes share is traced at the first preview alone."""
    task, mesh = toy_recipe(preview_count=4).build({}), make_mesh()
    programs = make_programs(task, mesh, abstract_state(task, mesh))
    batches = [next(ToyBatches(16))]
    evaluator = evaluate.Evaluator("toy", task.recipe, tmp_path, mesh, programs, batches, print)
    monkeypatch.setattr(evaluate.processes, "gather", lambda value: [value])
    traced = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda name, *_, **__: traced.append(name) if "jaxpr_trace" in name else None
    )
    rows, batch = evaluator._shared_rows()
    assert traced and rows["image"].shape == (8, SIZE, SIZE, 3) and rows["captions"][:2] == ["image 0", "image 1"]
    np.testing.assert_array_equal(rows["image"], batches[0]["image"][:8])
    traced.clear()
    again, _ = evaluator._shared_rows()
    assert not traced
    np.testing.assert_array_equal(rows["image"], again["image"])
