"""Modules that PyTorch pickled: read as PyTorch wrote them, converted, and refused where they would run code."""

import builtins
import io
import json
import os
import pickle
import shutil
import zipfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dalle2_jax import DALLE2
from dalle2_jax.checkpoint import Run
from dalle2_jax.cli import main
from dalle2_jax.lineage.dvae import DVAE
from dalle2_jax.weights import pickled
from dalle2_jax.weights.pickled import open_module
from dalle2_jax.weights.sources.openai_dvae import MODULES
from dalle2_jax.weights.tensors import WeightsError
from tests.parity.drawn_weights import draw, noise
from tests.parity.reference import reference_path

CONTAINERS = ("zip", "legacy")


@pytest.fixture(scope="module")
def reference():
    with np.load(reference_path("dvae")) as file:
        return {name.removeprefix("pickled/"): file[name] for name in file if name.startswith("pickled/")}


@pytest.fixture(scope="module")
def folders(reference, tmp_path_factory):
    """Folders with encoder.pkl and decoder.pkl as `torch.save` wrote them, by container."""
    found = {}
    for container in CONTAINERS:
        found[container] = tmp_path_factory.mktemp(container)
        for part in MODULES:
            (found[container] / f"{part}.pkl").write_bytes(reference[f"{container}/{part}"].tobytes())
    return found


@pytest.fixture(scope="module")
def weights(reference):
    """What the modules were given (make_dvae.py), by their names."""
    shapes = json.loads(str(reference["shapes"]))
    drawn = draw({f"pickled/{name}": shape for name, shape in shapes.items()})
    return {name.removeprefix("pickled/"): np.round(value * 16) / 16 for name, value in drawn.items()}


@pytest.mark.parametrize("container", CONTAINERS)
def test_tensors_are_those_that_were_saved(folders, weights, container):
    for part in MODULES:
        found = open_module(folders[container] / f"{part}.pkl", MODULES[part])
        expected = {name.removeprefix(f"{part}."): x for name, x in weights.items() if name.startswith(f"{part}.")}
        assert found.shapes == {name: x.shape for name, x in expected.items()} and len(expected) > 30
        assert set(found.dtypes.values()) == {"float32"}
        for name, value in expected.items():
            read = found.read(name)
            assert read.dtype == np.float32
            np.testing.assert_array_equal(read, value)


def test_openais_files_become_a_run(folders, reference, tmp_path, capsys):
    """One file in each container."""
    run, files = tmp_path / "run", tmp_path / "files"
    files.mkdir()
    for container, part in zip(CONTAINERS, MODULES, strict=True):
        shutil.copy(folders[container] / f"{part}.pkl", files)
    assert main(["convert", "openai_dvae", str(files), str(run)]) == 0
    message = capsys.readouterr().out
    assert "(published: 53,786,240)" in message and "(published: 43,829,766)" in message
    assert "licence of the weights: Modified MIT (OpenAI)" in message
    stage = Run(run).stage("dvae").load()
    assert stage.kind == "dvae" and stage.record.image_size == 256
    assert stage.module == DVAE(codebook_size=6, code_width=4, width=4, blocks=1)
    pixels = 1 / (1 + np.exp(-noise("dvae/pickled", (1, 3, 8, 8)).transpose(0, 2, 3, 1).astype(float)))
    module, variables = stage.module.clone(image_size=8), {"params": stage.params}
    logits = jax.jit(lambda x: module.apply(variables, x, method="logits"))(jnp.float32(2 * pixels - 1))
    np.testing.assert_allclose(logits, reference["logits"], rtol=1e-5, atol=1e-5 * np.abs(reference["logits"]).max())
    found = module.apply(variables, jnp.argmax(logits, axis=-1), method="decode")
    outputs = np.concatenate([found.mean, found.log_scale], axis=-1)
    np.testing.assert_allclose(outputs, reference["outputs"], rtol=1e-4, atol=1e-5)
    assert main(["describe", str(run)]) == 0
    assert "dvae (dvae): finished" in capsys.readouterr().out
    with pytest.raises(ValueError, match="has no stage that reads captions; its stages are: dvae"):
        DALLE2.load(run)


# What would run code


class Reduced:
    """Pickled as a call."""

    def __init__(self, called, *arguments):
        self.call = called, arguments

    def __reduce__(self):
        return self.call


def attacks(trace):
    """What a pickle calls, by the name that has to be in the refusal."""
    return {
        f"{os.mkdir.__module__}.mkdir": Reduced(os.mkdir, trace),
        f"{os.system.__module__}.system": Reduced(os.system, f"mkdir {trace}"),
        "__builtin__.eval": Reduced(builtins.eval, f"__import__('os').mkdir({trace!r})"),
        "__builtin__.getattr": Reduced(getattr, "", "join"),
        "torch.nn.modules.linear.Linear": b"\x80\x02ctorch.nn.modules.linear\nLinear\n)\x81}b.",
        "tests.weights.test_pickled.Reduced": b"\x80\x02ctests.weights.test_pickled\nReduced\n)\x81}b.",
    }


def in_zip(data: bytes) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("archive/data.pkl", data)
        archive.writestr("archive/byteorder", "little")
    return file.getvalue()


def in_legacy(data: bytes, keys: object = ()) -> bytes:
    head = (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True})
    return b"".join(pickle.dumps(part, protocol=2) for part in head) + data + pickle.dumps(list(keys), protocol=2)


@pytest.mark.parametrize("name", list(attacks("x")))
@pytest.mark.parametrize("wrap", [in_zip, in_legacy])
def test_code_is_not_run(tmp_path, capsys, name, wrap):
    trace, folder = tmp_path / "ran", tmp_path / "files"
    folder.mkdir()
    (folder / "decoder.pkl").write_bytes(b"")
    attack = attacks(str(trace))[name]
    data = attack if isinstance(attack, bytes) else pickle.dumps({"state": attack}, protocol=2)
    (folder / "encoder.pkl").write_bytes(wrap(data))
    assert main(["convert", "openai_dvae", str(folder), str(tmp_path / "run")]) == 2
    message = capsys.readouterr().err
    assert f"refers to {name!r}, which is no part of such a module and could run code" in message
    assert message.count("\n") == 1 and not trace.exists() and {path.name for path in tmp_path.iterdir()} == {"files"}
    if name.endswith("mkdir"):
        pickle.loads(data)  # it would have been
        assert trace.is_dir()


# Damage

CONV = b"cdall_e.utils\nConv2d\n"
TWICE = (  # a module that is in itself
    b"\x80\x02" + CONV + b")\x81q\x00}(X\x0b\x00\x00\x00_parameters}X\x08\x00\x00\x00_buffers}"
    b"X\x08\x00\x00\x00_modules}X\x01\x00\x00\x00ah\x00sub."
)


def module_with(parameter: bytes, name: bytes = b"w") -> bytes:
    """A module with one parameter, written by hand."""
    state = b"X\x0b\x00\x00\x00_parameters}X\x01\x00\x00\x00" + name + parameter + b"s"
    empty = b"X\x08\x00\x00\x00_buffers}X\x08\x00\x00\x00_modules}"
    return b"\x80\x02" + CONV + b")\x81}(" + state + empty + b"ub."


def tensor(offset: int, shape: bytes, strides: bytes, count: int = 4) -> bytes:
    """A parameter of `count` numbers under the key "0"."""
    storage = b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpuK%ctQ" % count
    return b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + b"K%c" % offset + shape + strides + b"\x89NtR"


ROW = b"K\x04\x85", b"K\x01\x85"


def test_a_module_by_hand(tmp_path):
    """The pickles of the tests below are right but for what each is about."""
    numbers = np.arange(4, dtype="<f4").tobytes()
    path = tmp_path / "x.pkl"
    path.write_bytes(in_legacy(module_with(tensor(0, *ROW)), "0") + (4).to_bytes(8, "little") + numbers)
    np.testing.assert_array_equal(open_module(path, MODULES["encoder"]).read("w"), [0, 1, 2, 3])
    part = tensor(1, b"K\x01K\x03\x86", b"K\x07K\x01\x86")  # the stride of an axis of one does not count
    path.write_bytes(in_legacy(module_with(part), "0") + (4).to_bytes(8, "little") + numbers)
    np.testing.assert_array_equal(open_module(path, MODULES["encoder"]).read("w"), [[1, 2, 3]])


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (module_with(tensor(1, *ROW)), "is larger than its storage '0'"),
        (module_with(tensor(0, b"K\x02K\x02\x86", b"K\x01K\x02\x86")), "with the strides \\[1, 2\\]"),
        (module_with(tensor(0, b"J\xff\xff\xff\xff\x85", b"K\x01\x85")), "a size that is no size"),
        (module_with(tensor(0, b"(" + b"K\x01" * 9 + b"t", b"(" + b"K\x01" * 9 + b"t")), "a tensor of 9 axes"),
        (module_with(b"K\x05"), "'w' is no tensor"),
        (b"\x80\x02K\x05.", "holds something other than a module"),
        (b"\x80\x02}.", "holds something other than a module"),
        (b"\x80\x02ctorch\nFloatStorage\n)\x81.", "it makes a torch.FloatStorage"),
        (b"\x80\x02ctorch\ndevice\n}b.", "it has a Global in a place where there can be none"),
        (b"\x80\x02ccollections\nOrderedDict\n}\x85R.", "it calls collections.OrderedDict with what it does not take"),
        (b"\x80\x02}}K\x01s.", "it has a dict in a place"),
        (TWICE, "the module 'a.' is in it twice"),
        (b"\x80\x02K\x01\x82\x01.", "has the instruction EXT1"),
        (b"\x80\x02K\x01K\x02.", "ValueError"),
        (b"\x80\x02h\x07.", "KeyError"),
        (b"\x80\x020.", "instruction POP"),
        (b"\x80\x02X\xff\xff\xff\x7fabc", "expected 2147483647 bytes"),
    ],
)
def test_what_is_no_such_module(tmp_path, data, words):
    path = tmp_path / "x.pkl"
    path.write_bytes(in_zip(data))
    with pytest.raises(WeightsError, match=words) as error:
        open_module(path, MODULES["encoder"])
    assert str(error.value).count("\n") == 0 and not str(error.value).endswith(".")


@pytest.mark.parametrize("container", CONTAINERS)
def test_files_cut_short(reference, tmp_path, container):
    """At any length: refused when they are opened."""
    whole, path = reference[f"{container}/encoder"].tobytes(), tmp_path / "x.pkl"
    for kept in (0, 3, 30, 200, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:kept])
        with pytest.raises(WeightsError, match="x.pkl is damaged, or no module that PyTorch saved"):
            open_module(path, MODULES["encoder"])


def test_numbers_that_do_not_fit_their_place(tmp_path, monkeypatch):
    path, data = tmp_path / "x.pkl", module_with(tensor(0, *ROW))
    for count in (3, 2**62):
        path.write_bytes(in_legacy(data, "0") + count.to_bytes(8, "little") + bytes(16))
        with pytest.raises(WeightsError, match="its storage '0' is not of 16 bytes"):
            open_module(path, MODULES["encoder"])
    path.write_bytes(in_legacy(data, ["1"]) + (4).to_bytes(8, "little") + bytes(16))
    with pytest.raises(WeightsError, match="its list of storages is not that of its tensors"):
        open_module(path, MODULES["encoder"])
    for storage, words in ((bytes(12), "is not of 16 bytes"), (None, "KeyError")):
        path.write_bytes(in_zip(data))
        with zipfile.ZipFile(path, "a") as archive:
            if storage is not None:
                archive.writestr("archive/data/0", storage)
        with pytest.raises(WeightsError, match=words):
            open_module(path, MODULES["encoder"])
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:  # a few bytes that become many
        archive.writestr("archive/data.pkl", bytes(10**6))
    path.write_bytes(file.getvalue())
    with pytest.raises(WeightsError, match="its members are compressed"):
        open_module(path, MODULES["encoder"])
    path.write_bytes(in_zip(data))
    monkeypatch.setattr(pickled, "LARGEST_PICKLE", 10)
    with pytest.raises(WeightsError, match="its pickle is larger than 10 bytes"):
        open_module(path, MODULES["encoder"])


def test_a_bit_that_flipped(reference, tmp_path):
    """The zip archive has checksums, and says which tensor."""
    whole, path = bytearray(reference["zip/encoder"].tobytes()), tmp_path / "x.pkl"
    path.write_bytes(whole)
    with zipfile.ZipFile(path) as archive:
        place = archive.getinfo(next(name for name in archive.namelist() if name.endswith("/data/0")))
        with archive.open(place) as member:
            content = member.read(16)
    position = whole.index(content, place.header_offset)
    whole[position] ^= 1
    path.write_bytes(whole)
    tensors = open_module(path, MODULES["encoder"])
    with pytest.raises(WeightsError, match="the tensor blocks.input.w of .* is damaged"):
        tensors.read("blocks.input.w")


def test_a_folder_without_them(tmp_path, capsys):
    (tmp_path / "files").mkdir()
    assert main(["convert", "openai_dvae", str(tmp_path / "files"), str(tmp_path / "run")]) == 2
    assert "has no encoder.pkl and no decoder.pkl; download encoder.pkl and decoder.pkl from" in capsys.readouterr().err


def test_an_encoder_in_the_decoders_place(folders, tmp_path, capsys):
    files = tmp_path / "files"
    files.mkdir()
    encoder = (folders["zip"] / "encoder.pkl").read_bytes()
    for part in MODULES:
        (files / f"{part}.pkl").write_bytes(encoder)
    assert main(["convert", "openai_dvae", str(files), str(tmp_path / "run")]) == 2
    assert "refers to 'dall_e.encoder.Encoder'" in capsys.readouterr().err
