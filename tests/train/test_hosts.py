"""Several real processes over loopback: they learn what one does, share checkpoints with it, and end together."""

import json
import signal
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

from dalle2_jax.checkpoint import checkpoint_steps, read_record
from dalle2_jax.sharding import assemble_rows, batch_sharding, make_mesh, own_rows
from tests.train.hosts import Process, do, start, train
from train.machine import hosts

CONFIG = """
import os
from tests.train.hosts import toy_system

if "BREAKS" in os.environ:
    raise RuntimeError("this host is broken")


def system():
    return toy_system(100_000, "unused", checkpoint_every=20)
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder for configs, runs and data."""
    folder = tmp_path_factory.mktemp("hosts")
    (folder / "toy.py").write_text(CONFIG)
    return folder


def losses(place: Path, run: str, stage: str = "toy", kind: str = "train") -> list[float]:
    lines = (place / "runs" / run / stage / "metrics.jsonl").read_text().splitlines()
    return [record["loss"] for record in map(json.loads, lines) if record["kind"] == kind]


def assert_close(found: list[float], expected: list[float], count: int) -> None:
    assert len(found) == len(expected) == count
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_two_processes_learn_what_one_does_and_share_its_checkpoints(place):
    train(place, "one", devices=4, looks=True)
    train(place, "from_one", devices=4, stop_after_steps=10)
    jobs = {
        "two": {"looks": True},
        "from_one": {"mesh": {"fsdp": 2}},
        "to_one": {"mesh": {"fsdp": 4}, "stop_after_steps": 10},
    }
    do(place, [*({"run": run, **job} for run, job in jobs.items()), {"run": "two"}])  # the last one finished before
    assert checkpoint_steps(place / "runs" / "to_one" / "toy") == [10]
    train(place, "to_one", devices=8)
    expected = losses(place, "one")
    assert min(expected) < 0.5 * max(expected)
    for run in jobs:
        assert_close(losses(place, run), expected, 20)
        assert read_record(place / "runs" / run / "toy").finished
    assert_close(losses(place, "two", kind="validation"), losses(place, "one", kind="validation"), 2)
    sheets = [
        np.asarray(Image.open(place / "runs" / run / "toy" / "samples" / "step_20.png")) for run in ("one", "two")
    ]
    assert sheets[0].shape == sheets[1].shape and np.abs(sheets[0] - sheets[1]).max() <= 1


@pytest.mark.slow
def test_any_number_of_processes_goes_on_from_any_other(place):
    train(place, "left_alone", steps=40, devices=4)
    train(place, "passed_on", steps=40, devices=4, stop_after_steps=10)
    for devices, job in (
        ((2, 2), {"stop_after_steps": 20}),
        ((1, 1, 1, 1), {"mesh": {"fsdp": 2}, "stop_after_steps": 30}),
        ((4, 4), {"mesh": {"fsdp": 8}}),
    ):
        do(place, [{"run": "passed_on", "steps": 40, **job}], devices)
    assert_close(losses(place, "passed_on"), losses(place, "left_alone"), 40)


@pytest.mark.slow
def test_every_stage_of_the_cascade_learns_the_same_in_two_processes(place):
    train(place, "alone", system="tiny", devices=4)
    meshes = {"tiny_data": {}, "tiny_fsdp": {"fsdp": 4}}
    do(place, [{"run": run, "mesh": mesh, "system": "tiny"} for run, mesh in meshes.items()])
    for run in meshes:
        for stage in ("clip", "prior", "decoder", "upsampler"):
            assert_close(losses(place, run, stage), losses(place, "alone", stage), 20)


def test_a_signal_to_one_process_stops_all_and_a_lost_coordinator_ends_the_other(place):
    arguments = [place / "toy.py", "toy", "--run", "stopped"]
    with start(place, arguments) as started:
        started[0].wait_for("toy 11/")
        started[1].popen.send_signal(signal.SIGTERM)
        assert [process.end() for process in started] == [128 + signal.SIGTERM] * 2
        first, second = (process.said for process in started)
    step = checkpoint_steps(place / "runs" / "stopped" / "toy")[-1]
    assert f"toy stopped and saved at step {step} of 100000" in first
    assert "images/s" not in second and "error" not in first + second
    with start(place, arguments) as started:
        started[0].wait_for(f"toy goes on from step {step}")
        started[0].wait_for(f"toy {step + 5}/")
        assert_ends_with_the_sentence(started, victim=0)


@pytest.mark.slow
@pytest.mark.parametrize("every", [1, 100_000])
def test_a_lost_process_ends_the_coordinator(place, every):
    """Lost between two saves, and most likely in the middle of one."""
    arguments = [place / "toy.py", "toy", "--run", f"lost_{every}", f"toy.checkpoint_every={every}"]
    with start(place, arguments) as started:
        started[0].wait_for("toy 7/")
        assert_ends_with_the_sentence(started, victim=1)


def assert_ends_with_the_sentence(started: list[Process], victim: int) -> None:
    began, survivor = time.monotonic(), started[1 - victim]
    started[victim].popen.kill()
    assert survivor.end(60) == 1, survivor.said
    print(f"without process {victim} the other one ended after {time.monotonic() - began:.1f} s")
    assert "error: another process of this run was lost" in survivor.said
    assert "start the same command again on every host" in survivor.said


@pytest.mark.slow
def test_an_error_in_one_process_ends_all(place):
    """One process's config cannot be read, and the other one has begun to wait for it."""
    arguments = [place / "toy.py", "toy", "--run", "broken"]
    with start(place, arguments, BREAKS="1") as started:
        assert [process.end(60) for process in started] == [1, 1]
        assert "RuntimeError: this host is broken" in started[1].said
        assert "error: another process of this run was lost, or has ended with an error" in started[0].said


@pytest.mark.slow
def test_folders_that_are_not_shared_are_refused(place):
    arguments = [place / "toy.py", "toy", "--run", "apart"]
    with start(place, arguments, runs=(place / "here", place / "there")) as started:
        assert [process.end(90) for process in started] == [2, 2]
        for process in started:
            assert "does not see" in process.said and "name by --runs-dir a folder on a disk" in process.said
    assert not (place / "here").exists()


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ({"coordinator": "a:1"}, "--coordinator HOST:PORT, --processes N, --process I go together; --processes N and"),
        ({"coordinator": "a:1", "count": 2}, "; --process I is missing"),
        (
            {"coordinator": "a", "count": 2, "index": 0},
            "--coordinator is 'a'; it must be the first process's HOST:PORT",
        ),
        ({"coordinator": "a:70000", "count": 2, "index": 0}, "'a:70000'; it must be"),
        ({"coordinator": "a:1", "count": 2, "index": 2}, "--process is 2 of --processes 2; it must lie in 0 to 1"),
        ({"coordinator": "a:1", "count": 0, "index": 0}, "--process is 0 of --processes 0"),
    ],
)
def test_flags_that_do_not_fit_are_one_sentence(flags, sentence):
    flags = {"coordinator": None, "count": None, "index": None, **flags}
    with pytest.raises(ValueError) as error:
        hosts.cluster_of(False, **flags)
    assert sentence in str(error.value)


def test_flags_of_one_process_and_of_several():
    assert hosts.cluster_of(False, None, None, None) is None
    assert hosts.cluster_of(True, None, None, None) == hosts.Cluster()
    assert hosts.cluster_of(False, "10.0.0.1:12", 4, 3) == hosts.Cluster("10.0.0.1:12", 4, 3)


def test_what_jax_and_orbax_say_of_a_lost_process_is_known():
    """As jax 0.10.2 and orbax 0.12.8 say it."""
    gloo = RuntimeError("UNKNOWN: Gloo AllGather failed: [external/gloo/gloo/transport/tcp/pair.cc:538] Read error")
    barrier = ValueError("a checkpoint could not be written below x: no space left")
    barrier.__cause__ = TimeoutError("Timeout waiting at barrier '[op=1] create_directory:post'.\nand more")
    assert hosts.lost_connection(gloo) == str(gloo)
    assert hosts.lost_connection(barrier) == "Timeout waiting at barrier '[op=1] create_directory:post'."
    assert hosts.lost_connection(ValueError("a batch of 12 does not divide over the 8 devices")) is None


def test_no_cluster_is_one_sentence_that_names_the_flags(capsys, monkeypatch):
    from train import __main__ as command
    from train.machine import backend

    monkeypatch.setattr(backend, "setup", lambda *_: None)

    def nothing(*_, **__):
        raise ValueError("coordinator_address should be defined.")

    monkeypatch.setattr(jax.distributed, "initialize", nothing)
    monkeypatch.setattr(hosts, "_last_words", lambda *_: None)
    assert command.main(["configs/shapes.py", "clip", "--distributed"]) == 2
    said = capsys.readouterr().err
    assert "--distributed finds no cluster here" in said and "--coordinator HOST:PORT --processes N --process I" in said


@pytest.mark.parametrize("sizes", [{}, {"fsdp": 4}, {"tensor": 2}, {"fsdp": 2, "tensor": 2}])
def test_a_processs_rows_are_those_that_its_devices_hold(sizes):
    """Four imagined processes of two devices each, on meshes whose devices come in any order."""
    order = np.random.default_rng(0).permutation(8)
    mesh = make_mesh(**sizes, devices=[jax.devices()[index] for index in order])
    sharding, batch = batch_sharding(mesh), np.arange(16 * 3).reshape(16, 3)
    placed = assemble_rows(sharding, batch)
    np.testing.assert_array_equal(placed, batch)
    assert placed.sharding == sharding and own_rows(sharding, 16).tolist() == list(range(16))
    for process in range(4):
        devices = jax.devices()[2 * process : 2 * process + 2]
        held = [shard.data[:, 0] for shard in placed.addressable_shards if shard.device in devices]
        assert own_rows(sharding, 16, devices).tolist() == sorted({int(value) // 3 for part in held for value in part})
