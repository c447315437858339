"""What is written comes back equal; what was interrupted or damaged is noticed, named and passed over."""

import dataclasses
import hashlib
import json
import os
import shutil
import sys
import threading
import types
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dalle2_jax.checkpoint import (
    CheckpointError,
    CheckpointWriter,
    Run,
    StageRecord,
    checkpoint_steps,
    load_params,
    load_stage,
    read_record,
    rebuild,
    restore_latest,
    store,
    to_json,
    with_defaults,
    write_record,
)
from dalle2_jax.checkpoint.rebuild import public_path
from dalle2_jax.checkpoint.run import first_of_kind, of_kind
from dalle2_jax.checkpoint.stage import stage_version
from dalle2_jax.clip import TextTransformer
from dalle2_jax.data import Data
from dalle2_jax.decoder import Decoder
from dalle2_jax.diffusion import Process
from dalle2_jax.layers import UNet
from dalle2_jax.sharding import make_mesh, partition


class Inner(nn.Module):
    width: int = 4
    sizes: tuple = (1, 2)
    rate: float | None = None
    dtype: str = "float32"


class Outer(nn.Module):
    inner: Inner
    other: Inner | None = None
    flag: bool = True


@dataclasses.dataclass(frozen=True)
class Settings:
    clip: float | None = 1.0
    nested: tuple = ((1, 2), (3,))


@pytest.fixture(autouse=True)
def inside_the_package(monkeypatch):
    """Only classes of dalle2_jax are rebuilt, so the ones above are put there."""
    module = types.ModuleType("dalle2_jax.made_for_a_test")
    for cls in (Inner, Outer, Settings):
        monkeypatch.setattr(cls, "__module__", module.__name__)
        setattr(module, cls.__name__, cls)
    monkeypatch.setitem(sys.modules, module.__name__, module)


def state_of(seed: int) -> dict:
    rng = np.random.default_rng(seed)
    params = {
        "dense": {"kernel": jnp.asarray(rng.normal(size=(64, 32)), jnp.float32), "bias": jnp.zeros(32, jnp.bfloat16)},
        "blocks": {"scale": jnp.asarray(rng.normal(size=(3, 8)), jnp.float32)},
    }
    return {
        "params": params,
        "ema": jax.tree.map(lambda x: x.astype(jnp.float32) * 0.5, params),
        "optimizer": optax.adamw(1e-3).init(params),
        "step": jnp.int32(seed),
        "skipped": jnp.int32(0),
        "key": jax.random.key(seed),
    }


def abstract(state: dict) -> dict:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)


def data_of(key_or_array) -> np.ndarray:
    if jnp.issubdtype(key_or_array.dtype, jax.dtypes.prng_key):
        return np.asarray(jax.random.key_data(key_or_array))
    return np.asarray(key_or_array)


def assert_same(a: dict, b: dict) -> None:
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(data_of(x), data_of(y))


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """A stage's folder with checkpoints of the steps 1 and 2; tests that damage it copy it."""
    folder = tmp_path_factory.mktemp("run") / "toy"
    with CheckpointWriter(folder) as writer:
        for step in (1, 2):
            writer.save(step, state_of(step), iterator={"position": step}, metadata={"seconds": 1.5 * step})
    return folder


@pytest.fixture
def copy(saved, tmp_path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "toy"))


# Modules as JSON


def test_rebuild_gives_the_same_module():
    module = Outer(inner=Inner(width=8, sizes=(1, 2, 3), rate=0.1), other=Inner(dtype="bfloat16"), flag=False)
    text = json.dumps(to_json({"module": module, "settings": Settings(clip=None), "plain": [1, "a", None]}))
    back = rebuild(json.loads(text))
    assert back["module"] == module and hash(back["module"]) == hash(module)
    assert back["module"].inner.sizes == (1, 2, 3) and back["settings"] == Settings(clip=None)
    assert back["settings"].nested == ((1, 2), (3,)) and back["plain"] == (1, "a", None)


def test_json_leaves_out_what_linen_adds():
    fields = to_json(Inner(width=3, name="called"))["fields"]
    assert fields == {"width": 3, "sizes": [1, 2], "rate": None, "dtype": "float32"}


def test_the_networks_rebuild():
    from dalle2_jax.diffusion import Process
    from dalle2_jax.prior import DiffusionPrior

    for part in (
        DiffusionPrior(embedding_size=8, width=16, depth=2, heads=2),
        Process(schedule="linear", timesteps=10),
    ):
        assert rebuild(json.loads(json.dumps(to_json(part)))) == part


@pytest.mark.parametrize(
    ("data", "named"),
    [
        ({"class": "dalle2_jax.made_for_a_test.Missing", "fields": {}}, "Missing"),
        ({"class": "dalle2_jax.no_such_file.Inner", "fields": {}}, "no_such_file"),
        ({"class": "os.system", "fields": {}}, "os.system"),
        ({"class": "dalle2_jaxes.Inner", "fields": {}}, "dalle2_jaxes"),
        ({"class": "dalle2_jax.made_for_a_test.Inner", "fields": {"widht": 3}}, "'width'"),
        ({"class": "dalle2_jax.made_for_a_test.Outer", "fields": {}}, "inner"),
    ],
)
def test_rebuild_names_what_it_does_not_know(data, named):
    with pytest.raises(CheckpointError, match=named):
        rebuild(data)


def test_fields_that_are_newer_than_a_record_have_their_defaults():
    data = {"module": to_json(Outer(inner=Inner(width=8), other=Inner(dtype="bfloat16")))}
    older = json.loads(json.dumps(data))
    del older["module"]["fields"]["inner"]["fields"]["rate"]
    assert older != data and with_defaults(older) == data
    foreign = {"class": "os.system", "fields": {}}
    assert with_defaults(foreign) == foreign


def test_what_json_cannot_hold_is_named():
    with pytest.raises(CheckpointError, match=r"value\.module\.sizes\[1\]"):
        to_json({"module": Inner(sizes=(1, jnp.ones(2)))})


# stage.json


def test_stage_file(tmp_path):
    values = {"stage": "mine", "kind": "prior", "module": Inner(width=7), "seed": 3, "caption": "ein Würfel"}
    record = StageRecord.of(values)
    write_record(tmp_path / "prior", record)
    assert read_record(tmp_path / "prior") == record
    assert (record.stage, record.kind, record.seed, record.finished) == ("mine", "prior", 3, False)
    assert record.rebuilt("module") == Inner(width=7) and record.extra == {"caption": "ein Würfel"}
    written = json.loads((tmp_path / "prior" / "stage.json").read_text())
    assert written["module"] == to_json(Inner(width=7)) and written["format"] == 1 and "tokenizer" not in written
    assert [path.name for path in (tmp_path / "prior").iterdir()] == ["stage.json"]


def test_stage_file_that_cannot_be_written_leaves_the_old_one(tmp_path):
    record = StageRecord(stage="mine", kind="prior", module=Inner())
    write_record(tmp_path, record)
    with pytest.raises(CheckpointError, match=r"extra\.a is a object"):
        write_record(tmp_path, dataclasses.replace(record, extra={"a": object()}))
    assert read_record(tmp_path) == record and [path.name for path in tmp_path.iterdir()] == ["stage.json"]


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"kind": "prior"}', '{"format": 99}', '{"format": 1, "kind": "prior"}']
)
def test_damaged_stage_file(tmp_path, text):
    (tmp_path / "stage.json").write_text(text)
    with pytest.raises(CheckpointError, match=str(tmp_path)):
        read_record(tmp_path)


def test_no_stage_there(tmp_path):
    with pytest.raises(CheckpointError, match="not a stage's folder"):
        load_stage(tmp_path / "nothing")


def test_classes_are_recorded_by_their_public_path():
    public = {
        Decoder: "dalle2_jax.decoder.Decoder",
        UNet: "dalle2_jax.layers.UNet",
        TextTransformer: "dalle2_jax.clip.TextTransformer",
        Process: "dalle2_jax.diffusion.Process",
        Data: "dalle2_jax.data.Data",
        Inner: "dalle2_jax.made_for_a_test.Inner",
    }
    assert {cls: public_path(cls) for cls in public} == public


def test_only_allowed_packages_are_rebuilt(copy, monkeypatch):
    module = types.ModuleType("mine.networks")
    monkeypatch.setattr(Inner, "__module__", module.__name__)
    module.Inner = Inner
    for name in ("mine", "mine.networks"):
        monkeypatch.setitem(sys.modules, name, module if name == module.__name__ else types.ModuleType(name))
    write_record(copy, StageRecord(stage="toy", kind="toy", module=Inner(width=3)))
    with pytest.raises(CheckpointError, match=r"'mine.networks.Inner' is not part .* allow=\('mine',\)"):
        load_stage(copy)
    for allow in (("mine",), ("other", "mine.networks")):
        assert load_stage(copy, allow=allow).module == Inner(width=3)
    with pytest.raises(CheckpointError, match="is not part"):
        load_stage(copy, allow=("min",))
    assert load_stage(copy, module=Inner(width=5)).module == Inner(width=5)


def test_the_stages_of_a_run(saved, tmp_path):
    with pytest.raises(CheckpointError, match="no trained stage in"):
        assert Run(tmp_path / "none").stages
    records = {
        "large": {"kind": "upsampler", "image_size": 64, "low_size": 32},
        "middle": {"kind": "upsampler", "image_size": 32, "low_size": 16},
        "own": {"kind": "gan", "tokenizer": "of own"},
        "images": {"kind": "decoder", "image_size": 16, "tokenizer": "of images"},
    }
    records = {name: StageRecord(stage=name, module=Inner(), **values) for name, values in records.items()}
    for name, record in records.items():
        write_record(tmp_path / name, record)
    run = Run(tmp_path)
    assert [stage.name for stage in run] == ["images", "middle", "large", "own"]
    assert [stage.name for stage in of_kind(run, "upsampler")] == ["middle", "large"]
    assert run.caption_reader.name == "images"
    clip = StageRecord(stage="zclip", kind="clip", module=Inner(), tokenizer="of clip")
    write_record(tmp_path / "zclip", clip)
    assert run.caption_reader.name == "images"  # what was read is kept
    run = Run(tmp_path)
    assert run.caption_reader.name == "zclip" and first_of_kind(run, "clip").record == clip
    stage = run.stage("images")
    assert (stage.exists, stage.step, stage.version) == (True, None, None) and not stage.is_finished()
    shutil.copytree(saved / "checkpoints", tmp_path / "images" / "checkpoints")
    assert not stage.is_finished()
    write_record(tmp_path / "images", dataclasses.replace(records["images"], finished=True))
    stage = Run(tmp_path).stage("images")
    assert (stage.step, stage.version) == (2, stage_version(saved, 2))
    assert stage.is_finished() and stage.is_finished(2) and not stage.is_finished(3)
    assert not run.stage("other").exists


# Checkpoints


def test_everything_comes_back(saved):
    restored = restore_latest(saved, abstract(state_of(0)))
    assert_same(restored.state, state_of(2))
    assert (restored.step, restored.iterator, restored.metadata) == (2, {"position": 2}, {"seconds": 3.0})
    assert restored.damaged == ()


def test_nothing_to_restore(tmp_path):
    assert restore_latest(tmp_path, abstract(state_of(0))) is None
    with pytest.raises(CheckpointError, match="no finished checkpoint"):
        load_params(tmp_path)


def test_restored_to_the_shardings_asked_for(saved):
    mesh = make_mesh(fsdp=8)
    shapes = jax.eval_shape(lambda: state_of(0))
    shardings = partition(shapes, mesh, smallest=1)
    wanted = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings)
    state = restore_latest(saved, wanted).state
    kernel = state["params"]["dense"]["kernel"]
    assert kernel.sharding == shardings["params"]["dense"]["kernel"]
    assert kernel.addressable_shards[0].data.shape == (8, 32)
    assert_same(state, state_of(2))


def test_later_stages_read_the_average_alone(saved, monkeypatch, tmp_path):
    copy = Path(shutil.copytree(saved, tmp_path / "toy"))
    for step in (1, 2):  # neither optimizer nor raw parameters are needed for it
        shutil.rmtree(copy / "checkpoints" / str(step) / "optimizer")
        shutil.rmtree(copy / "checkpoints" / str(step) / "params")
    ema = load_params(copy)
    assert_same(ema, jax.tree.map(np.asarray, state_of(2)["ema"]))
    assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(ema))
    with pytest.raises(CheckpointError, match="params"):
        load_params(copy, ema=False)


def test_load_stage(copy):
    module, process = Inner(width=3), Settings(clip=None)
    write_record(copy, StageRecord(stage="toy", kind="prior", module=module, process=process))
    stage = load_stage(copy)
    assert (stage.name, stage.kind, stage.module) == ("toy", "prior", Inner(width=3))
    assert stage.record.rebuilt("process") == Settings(clip=None) and stage.record.kind == "prior"
    assert_same(stage.params, jax.tree.map(np.asarray, state_of(2)["ema"]))
    assert_same(load_stage(copy, ema=False).params, jax.tree.map(np.asarray, state_of(2)["params"]))
    with pytest.raises(CheckpointError, match="'image_size'"):
        stage.record.rebuilt("image_size")


def test_only_the_last_ones_are_kept(tmp_path):
    with CheckpointWriter(tmp_path, keep=2) as writer:
        for step in (5, 10, 15, 20):
            writer.save(step, {"params": {"w": jnp.full(4, float(step))}, "step": jnp.int32(step)})
    assert checkpoint_steps(tmp_path) == [15, 20]
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["15", "20"]


def test_saving_goes_on_in_the_background(tmp_path, monkeypatch):
    """`save` returns while the files are still held up, and the state may be donated before they are written."""
    from orbax.checkpoint import v1 as ocp

    gate = threading.Event()
    start = ocp.save_checkpointables_async

    class Held:
        def __init__(self, response):
            self.response = response

        def result(self):
            assert gate.wait(60)
            return self.response.result()

    monkeypatch.setattr(ocp, "save_checkpointables_async", lambda *args, **kwargs: Held(start(*args, **kwargs)))
    overwrite = jax.jit(lambda state: jax.tree.map(lambda x: x * 0 - 7, state), donate_argnums=0)
    state = {"params": {"w": jnp.arange(2.0**20)}, "step": jnp.int32(3)}
    with CheckpointWriter(tmp_path) as writer:
        writer.save(3, state)
        assert checkpoint_steps(tmp_path) == []
        state = jax.block_until_ready(overwrite(overwrite(state)))
        gate.set()
    assert checkpoint_steps(tmp_path) == [3]
    np.testing.assert_array_equal(load_params(tmp_path, ema=False)["w"], np.arange(2.0**20, dtype=np.float32))


def test_a_save_that_fails_is_reported(tmp_path, monkeypatch):
    monkeypatch.setattr(
        "dalle2_jax.checkpoint.store.write_checksums", lambda path: (_ for _ in ()).throw(OSError(28, "No space left"))
    )
    writer = CheckpointWriter(tmp_path)
    writer.save(1, {"params": {"w": jnp.ones(3)}})
    with pytest.raises(CheckpointError, match="No space left"):
        writer.close()
    assert checkpoint_steps(tmp_path) == []


def test_an_interrupted_save_does_not_count_and_is_cleared_away(copy):
    (copy / "checkpoints" / "2" / "CHECKSUMS").unlink()
    (copy / "checkpoints" / "3.orbax-checkpoint-tmp").mkdir()
    assert restore_latest(copy, abstract(state_of(0))).step == 1
    CheckpointWriter(copy).close()
    assert [path.name for path in (copy / "checkpoints").iterdir()] == ["1"]


def test_only_interrupted_saves_are_cleared_away(copy):
    """Not folders of other names, of the user's or of a later version's, nor anything behind a link."""
    checkpoints, elsewhere = copy / "checkpoints", copy.parent / "elsewhere"
    for folder in (checkpoints / "best", checkpoints / "1.damaged", checkpoints / "²", elsewhere):
        folder.mkdir()
        (folder / "mine.txt").write_text("kept")
    (checkpoints / "7").symlink_to(elsewhere)
    (checkpoints / "6").symlink_to(copy / "nowhere")
    before = sorted(path.name for path in checkpoints.iterdir())
    with CheckpointWriter(copy, keep=1) as writer:
        writer.save(3, state_of(3))
    left = sorted(path.name for path in checkpoints.iterdir())
    assert left == sorted({*before, "3"} - {"1", "2"})
    with CheckpointWriter(copy) as writer, pytest.raises(CheckpointError, match="7 is a symbolic link where"):
        writer.save(7, state_of(7))
    for folder in (checkpoints / "best", checkpoints / "1.damaged", checkpoints / "²", elsewhere):
        assert (folder / "mine.txt").read_text() == "kept"


@pytest.mark.parametrize("linked", ["checkpoints", "stage"])
def test_nothing_is_removed_behind_a_link(copy, linked):
    """What was there before stays, under another name where a new one takes its place."""
    disk = copy.parent / f"disk {linked}"
    if linked == "checkpoints":
        (copy / "checkpoints").rename(disk)
        stage, disk = copy, disk
        (copy / "checkpoints").symlink_to(disk)
    else:
        copy.rename(disk)
        copy.symlink_to(disk)
        stage, disk = copy, disk / "checkpoints"
    (disk / "4").mkdir()
    (disk / "4" / "some").write_text("kept")
    with CheckpointWriter(stage, keep=1) as writer:
        for step in (2, 4, 5, 6):
            writer.save(step, state_of(step))
    assert sorted(path.name for path in disk.iterdir()) == ["1", "2.before", "4.before", "6"]
    assert (disk / "4.before" / "some").read_text() == "kept" and (disk / "2.before" / "CHECKSUMS").is_file()
    assert restore_latest(stage, abstract(state_of(0))).step == 6


def test_a_second_damaged_one_is_set_aside_too(copy):
    shutil.copytree(copy / "checkpoints" / "2", copy / "checkpoints" / "2.damaged")
    flip(largest(copy / "checkpoints" / "2"), 0.5)
    assert restore_latest(copy, abstract(state_of(0))).step == 1
    assert sorted(path.name for path in (copy / "checkpoints").iterdir()) == ["1", "2-2.damaged", "2.damaged"]


def files_of(checkpoint: Path) -> list[str]:
    return sorted(path.relative_to(checkpoint).as_posix() for path in checkpoint.rglob("*") if path.is_file())


def flip(path: Path, at: float) -> None:
    content = bytearray(path.read_bytes())
    content[min(int(at * len(content)), len(content) - 1)] ^= 0x10
    path.write_bytes(content)


def largest(checkpoint: Path) -> Path:
    return max((path for path in checkpoint.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)


@pytest.mark.parametrize("at", [0.0, 0.37, 0.5, 0.99])
def test_a_changed_byte_is_noticed_and_the_one_before_is_taken(copy, at):
    damaged = largest(copy / "checkpoints" / "2")
    flip(damaged, at)
    restored = restore_latest(copy, abstract(state_of(0)))
    assert restored.step == 1 and len(restored.damaged) == 1
    assert damaged.name in restored.damaged[0] and "changed" in restored.damaged[0] and "\n" not in restored.damaged[0]
    assert_same(restored.state, state_of(1))
    assert checkpoint_steps(copy) == [1]  # the damaged one is out of the way of the next save of step 2


def test_every_file_is_covered(saved):
    """A changed byte in any file at all, the list of checksums itself included."""
    from dalle2_jax.checkpoint.files import verify

    checkpoint = saved / "checkpoints" / "1"
    names = files_of(checkpoint)
    assert len(names) > 10 and "CHECKSUMS" in names and "extras.json" in names
    for name in names:
        whole = (checkpoint / name).read_bytes()
        if not whole:
            continue
        try:
            flip(checkpoint / name, 0.5)
            with pytest.raises(CheckpointError):
                verify(checkpoint)
        finally:
            (checkpoint / name).write_bytes(whole)
    verify(checkpoint)


@pytest.mark.parametrize("name", ["../../../mine.txt", "/dev/zero", "ema/../../x", ""])
def test_a_list_of_files_outside(copy, name):
    """The seal is anybody's to make."""
    checksums = copy / "checkpoints" / "2" / "CHECKSUMS"
    lines = "".join(checksums.read_text().splitlines(keepends=True)[:-1]) + f"{'0' * 32} {name}\n"
    checksums.write_text(lines + hashlib.blake2b(lines.encode(), digest_size=16).hexdigest() + "\n")
    restored = restore_latest(copy, abstract(state_of(0)))
    assert restored.step == 1 and f"names {name!r}, which is no file of the checkpoint" in restored.damaged[0]


@pytest.mark.parametrize("kind", ["link", "folder", "device", "pipe"])
def test_what_is_no_plain_file_is_not_read(copy, kind):
    path = largest(copy / "checkpoints" / "2" / "ema")
    if kind == "folder":
        path = path.parent
        path.rename(copy / "elsewhere")
        path.symlink_to(copy / "elsewhere")
    else:
        path.rename(copy / "elsewhere")
        make = {"link": lambda: path.symlink_to(copy / "elsewhere"), "device": lambda: path.symlink_to("/dev/zero")}
        make.get(kind, lambda: os.mkfifo(path))()
    restored = restore_latest(copy, abstract(state_of(0)))
    assert restored.step == 1 and "is a link or no plain file" in restored.damaged[0]
    assert_same(load_params(copy), jax.tree.map(np.asarray, state_of(1)["ema"]))


@pytest.mark.parametrize(
    ("write", "sentence"),
    [
        (lambda path: path.write_text("[" * 100_000), "nested too deeply"),
        (lambda path: path.write_text('{"step": ' + "1" * 5000 + "}"), "is damaged"),
        (lambda path: path.write_bytes(b"\xff\xfe"), "is damaged"),
        (lambda path: os.truncate(path, 2**26 + 1), "more than 64 MiB"),
        (lambda path: (path.unlink(), path.mkdir()), "not a stage's folder"),
        (lambda path: (path.unlink(), os.mkfifo(path)), "not a stage's folder"),
    ],
)
def test_a_record_that_cannot_be_read(tmp_path, write, sentence):
    (tmp_path / "stage.json").touch()
    write(tmp_path / "stage.json")
    with pytest.raises(CheckpointError, match=sentence):
        read_record(tmp_path)


@pytest.mark.parametrize("keep", [0, 0.5])
def test_a_truncated_file(copy, keep):
    path = largest(copy / "checkpoints" / "2")
    content = path.read_bytes()
    path.write_bytes(content[: int(keep * len(content))])
    assert restore_latest(copy, abstract(state_of(0))).step == 1


def test_a_missing_file(copy):
    path = largest(copy / "checkpoints" / "2" / "ema")
    path.unlink()
    restored = restore_latest(copy, abstract(state_of(0)))
    assert restored.step == 1 and "missing" in restored.damaged[0] and "ema/" in restored.damaged[0]


def test_loading_for_use_falls_back_and_changes_nothing(copy, caplog):
    flip(largest(copy / "checkpoints" / "2" / "ema"), 0.5)
    assert_same(load_params(copy), jax.tree.map(np.asarray, state_of(1)["ema"]))
    assert "damaged" in caplog.text and "step 1" in caplog.text
    assert checkpoint_steps(copy) == [1, 2]
    assert_same(load_params(copy, ema=False), jax.tree.map(np.asarray, state_of(2)["params"]))


def test_nothing_whole_is_left(copy):
    for step in (1, 2):
        flip(largest(copy / "checkpoints" / str(step)), 0.5)
    for _ in range(2):  # and asking again does not start anew in silence
        with pytest.raises(CheckpointError, match="no checkpoint is left") as raised:
            restore_latest(copy, abstract(state_of(0)))
        assert "\n" not in str(raised.value)
    with pytest.raises(CheckpointError, match="no checkpoint is left"):
        [flip(largest(copy / "checkpoints" / str(step) / "ema"), 0.2) for step in (1, 2)]
        load_params(copy)


def test_another_state_than_the_saved_one_is_refused(saved):
    other = abstract(state_of(0))
    other["params"]["dense"]["kernel"] = jax.ShapeDtypeStruct((64, 33), jnp.float32)
    with pytest.raises(CheckpointError, match="does not hold the state"):
        restore_latest(saved, other)


def test_a_position_that_several_processes_wrote_down_is_that_of_any_number():
    assert store._position(Path("x"), {"iterators": [{"position": 3}, {"position": 3}]}) == {"position": 3}
    with pytest.raises(CheckpointError, match="its processes stood at different batches"):
        store._position(Path("x"), {"iterators": [{"position": 3}, {"position": 4}]})
