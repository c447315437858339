"""Files that are not what they should be: named, refused before anything is written, and never run."""

import json
import os
import pickle
import re
import shutil
import sys
import types
import zipfile

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from dalle2_jax.checkpoint import load_stage
from dalle2_jax.cli import main
from dalle2_jax.weights.hub import needed
from dalle2_jax.weights.sources import open_clip
from dalle2_jax.weights.table import Table
from dalle2_jax.weights.tensors import Tensors, WeightsError, joined, open_tensors
from tests.weights import folders


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return folders.clip_folder(tmp_path_factory.mktemp("clip") / "clip")


@pytest.fixture
def folder(whole, tmp_path):
    return shutil.copytree(whole, tmp_path / "clip")


def refused(folder, capsys) -> str:
    """What `dalle2 convert` says; nothing is left on the disk."""
    run = folder.parent / "run"
    assert main(["convert", "clip", str(folder), str(run)]) == 2
    assert {path.name for path in folder.parent.iterdir()} == {folder.name}
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    return message


def changed(folder, change) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


NAME = "text_model.encoder.layers.0.mlp.fc1.weight"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.pop(NAME), f"1 missing tensors \\({NAME}\\)"),
        (lambda t: t.update({"more.weight": np.zeros(3, np.float32)}), "1 tensors too many \\(more.weight\\)"),
        (
            lambda t: t.update({NAME: t[NAME][1:]}),
            f"the tensor {NAME} of .* has the shape \\[39, 24\\] where \\[40, 24",
        ),
        (lambda t: t.update({NAME: t[NAME].astype(np.int64)}), f"the tensor {NAME} of .* is int64; weights are one of"),
    ],
)
def test_tensors_that_do_not_fit(folder, capsys, change, words):
    changed(folder, change)
    assert re.search(words, refused(folder, capsys))


@pytest.mark.parametrize("kept", [4, 100, 0.5, -1])
def test_a_truncated_file(folder, capsys, kept):
    path = folder / "model.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[: int(kept * len(data))] if isinstance(kept, float) else data[:kept])
    assert "model.safetensors is damaged" in refused(folder, capsys)


@pytest.mark.parametrize("offsets", [[0, 2**40], [8, 4], [-4, 0]])
def test_a_tampered_header(folder, capsys, offsets):
    path = folder / "model.safetensors"
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    header[NAME]["data_offsets"] = offsets
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])
    assert "model.safetensors is damaged" in refused(folder, capsys)


def test_a_damaged_number(folder, capsys):
    def spoil(tensors):
        tensors[NAME][3, 4] = np.nan

    changed(folder, spoil)
    assert f"the tensor {NAME} of" in (message := refused(folder, capsys)) and "not finite" in message


@pytest.mark.parametrize(
    ("file", "text", "words"),
    [
        ("config.json", "{", "config.json cannot be read"),
        ("config.json", "[]", "config.json holds no settings"),
        ("config.json", '{"model_type": "bert"}', "holds a model of the type 'bert'; a CLIP is wanted"),
        ("vocab.json", "{}", "is not CLIP's"),
        ("merges.txt", "#version\na b c\n", "is not CLIP's"),
        ("tokenizer_config.json", '{"pad_token": "<nothing>"}', "pads with '<nothing>', which the vocabulary does not"),
    ],
)
def test_settings_that_are_broken(folder, capsys, file, text, words):
    (folder / file).write_text(text)
    assert words in refused(folder, capsys)


def test_settings_of_another_size(folder, capsys):
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["vocab_size"] = 500
    (folder / "config.json").write_text(json.dumps(config))
    assert "has 500 tokens and the vocabulary beside it 600; they are of two models" in refused(folder, capsys)


def test_settings_by_which_nothing_can_be_built(folder, tmp_path, capsys):
    """Found only where the network is built: said by the command line of its SRC, else of the weights' file."""
    from dalle2_jax.weights import run
    from dalle2_jax.weights.sources import clip

    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["num_attention_heads"] = 0
    (folder / "config.json").write_text(json.dumps(config))
    sentence = "the settings of {} are not what they should be (ZeroDivisionError: "
    assert sentence.format(folder) in refused(folder, capsys)
    conversions = clip.conversions(folder)
    with pytest.raises(WeightsError, match=re.escape(sentence.format(folder / "model.safetensors"))):
        run.write_run(tmp_path / "run", conversions, {"licence": ""}, log=lambda line: None)
    assert not (tmp_path / "run").exists()


def test_half_precision_files_are_read(folder, tmp_path):
    path = folder / "model.safetensors"
    tensors = load_file(path)
    save_file({name: value.astype(ml_dtypes.bfloat16) for name, value in tensors.items()}, path)
    assert main(["convert", "clip", str(folder), str(tmp_path / "run")]) == 0


def test_files_in_parts(folder, tmp_path):
    """As transformers splits what is large; and an index that points elsewhere."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = {name: f"part{place % 2}.safetensors" for place, name in enumerate(tensors)}
    for file in set(names.values()):
        save_file({name: tensors[name] for name in tensors if names[name] == file}, folder / file)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": names}))
    assert main(["convert", "clip", str(folder), str(tmp_path / "run")]) == 0
    read = open_tensors(index)
    np.testing.assert_array_equal(read.read(NAME), tensors[NAME])
    index.write_text(json.dumps({"weight_map": {**names, NAME: "../part0.safetensors"}}))
    with pytest.raises(WeightsError, match="points out of its folder"):
        open_tensors(index)
    index.write_text(json.dumps({"weight_map": {name: file for name, file in names.items() if name != NAME}}))
    with pytest.raises(WeightsError, match=f"do not agree on the tensor {NAME}"):
        open_tensors(index)
    index.write_text("{}")
    with pytest.raises(WeightsError, match="has no weight_map"):
        open_tensors(index)


class Harmful:
    """Makes a folder when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def write_harmful(path, trace) -> None:
    """In the layout of torch's files."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps({"weight": Harmful(trace)}, protocol=2))
        archive.writestr("archive/version", "3\n")
        archive.writestr("archive/byteorder", "little")


def test_a_pickle_is_read_by_torch_alone(folder, capsys, tmp_path_factory, monkeypatch):
    """Here there is no torch; what a pickle holds is not looked at by anybody else (with torch: test_live.py)."""
    trace = tmp_path_factory.mktemp("trace") / "ran"
    (folder / "model.safetensors").unlink()
    write_harmful(folder / "pytorch_model.bin", trace)
    monkeypatch.setitem(sys.modules, "torch", None)
    assert "is a PyTorch file, which only torch can read" in refused(folder, capsys)
    assert not trace.exists()


def test_torch_is_asked_for_tensors_alone(folder, capsys, monkeypatch):
    asked = {}

    def load(path, **named):
        asked.update(named)
        raise pickle.UnpicklingError("Weights only load failed")

    monkeypatch.setitem(sys.modules, "torch", types.SimpleNamespace(load=load, Tensor=np.ndarray))
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    assert "holds more than tensors, which could run code, and is not opened" in refused(folder, capsys)
    assert asked["weights_only"] is True


def test_a_file_that_is_no_weights(tmp_path):
    (tmp_path / "x.onnx").write_bytes(b"")
    with pytest.raises(WeightsError, match="is no weights file that is known here"):
        open_tensors(tmp_path / "x.onnx")
    with pytest.raises(WeightsError, match="there is no file"):
        open_tensors(tmp_path / "y.safetensors")


def test_a_table_that_forgets_or_repeats_is_our_own_mistake():
    parameters = {"a": np.zeros((2, 3), np.float32), "b": np.zeros(2, np.float32)}
    tensors = Tensors("x", {"one": (2, 3)}, {"one": "float32"}, {}.get)
    table = Table()
    table.plain("a", "one")
    with pytest.raises(AssertionError, match="does not make these parameters once: \\['b'\\]"):
        table.check(tensors, parameters)
    table.plain("b", "one")
    with pytest.raises(AssertionError, match="a tensor stands twice"):
        table.check(tensors, parameters)


def test_what_stops_half_way_leaves_nothing(whole, tmp_path, monkeypatch):
    from dalle2_jax.weights import run
    from dalle2_jax.weights.sources import clip

    monkeypatch.setattr(run, "write_record", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        run.write_run(tmp_path / "run", clip.conversions(whole), {"licence": ""}, log=lambda line: None)
    assert list(tmp_path.iterdir()) == []


def test_which_files_of_a_repository_are_fetched():
    files = [
        "README.md",
        "model_index.json",
        "prior/config.json",
        "prior/diffusion_pytorch_model.bin",
        "prior/diffusion_pytorch_model.safetensors",
        "prior/diffusion_pytorch_model.fp16.safetensors",
        "decoder/diffusion_pytorch_model.bin",
        "decoder/diffusion_pytorch_model.fp16.bin",
        "tokenizer/merges.txt",
        "tokenizer/vocab.json",
        "onnx/model.onnx",
        "flax_model.msgpack",
        "model-00001-of-00002.safetensors",
        "model.safetensors.index.json",
        "image.png",
    ]
    assert needed(files) == [
        "model_index.json",
        "prior/config.json",
        "prior/diffusion_pytorch_model.safetensors",
        "decoder/diffusion_pytorch_model.bin",
        "tokenizer/merges.txt",
        "tokenizer/vocab.json",
        "model-00001-of-00002.safetensors",
        "model.safetensors.index.json",
    ]


class Hub(types.SimpleNamespace):
    """In huggingface_hub's place."""


def test_a_repository_is_fetched(whole, tmp_path, monkeypatch, capsys):
    asked = {}

    def snapshot_download(name, allow_patterns):
        asked[name] = allow_patterns
        return str(whole)

    class HfApi:
        def list_repo_files(self, name):
            return [path.name for path in whole.iterdir()]

    monkeypatch.setitem(sys.modules, "huggingface_hub", Hub(HfApi=HfApi, snapshot_download=snapshot_download))
    assert main(["convert", "clip", "openai/some-clip", str(tmp_path / "run")]) == 0
    assert "model.safetensors" in asked["openai/some-clip"]
    record = json.loads((tmp_path / "run" / "clip" / "stage.json").read_text())
    assert record["source"]["from"] == "openai/some-clip"


def test_a_repository_that_cannot_be_fetched(tmp_path, monkeypatch, capsys):
    class HfApi:
        def list_repo_files(self, name):
            raise ConnectionError("no network\nand a trace")

    monkeypatch.setitem(sys.modules, "huggingface_hub", Hub(HfApi=HfApi, snapshot_download=None))
    assert main(["convert", "clip", "openai/some-clip", str(tmp_path / "run")]) == 2
    message = capsys.readouterr().err
    assert "could not be fetched (no network); fetch it by other means" in message and message.count("\n") == 1
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert main(["convert", "clip", "openai/some-clip", str(tmp_path / "run")]) == 2
    assert "pip install huggingface_hub" in capsys.readouterr().err


def test_settings_as_older_files_have_them(folder, tmp_path):
    """Halves that are null under their old names, as openai/clip-vit-base-patch32 has them; other means."""
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "text_config_dict": None, "vision_config_dict": None}))
    (folder / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0.5] * 3, "image_std": [0.25] * 3}))
    assert main(["convert", "clip", str(folder), str(tmp_path / "run")]) == 0
    vision = load_stage(tmp_path / "run" / "clip").module.vision
    assert vision.mean == (0.5, 0.5, 0.5) and vision.std == (0.25, 0.25, 0.25)


@pytest.mark.parametrize(
    ("file", "field", "value"),
    [
        ("decoder/config.json", "down_block_types", None),
        ("decoder/config.json", "sample_size", None),
        ("text_proj/config.json", "cross_attention_dim", None),
        ("super_res_first/config.json", "block_out_channels", 32),
    ],
)
def test_settings_of_karlo_that_are_broken(karlo, tmp_path, capsys, file, field, value):
    folder = shutil.copytree(karlo, tmp_path / "karlo")
    config = json.loads((folder / file).read_text())
    del config[field]
    (folder / file).write_text(json.dumps(config if value is None else {**config, field: value}))
    assert main(["convert", "karlo", str(folder), str(tmp_path / "run")]) == 2
    message = capsys.readouterr().err
    assert "are not what they should be" in message and message.count("\n") == 1
    assert {path.name for path in tmp_path.iterdir()} == {"karlo"}


@pytest.fixture(scope="module")
def karlo(tmp_path_factory):
    return folders.karlo_folder(tmp_path_factory.mktemp("karlo") / "karlo")


@pytest.mark.parametrize(
    "change",
    [
        lambda t: t.update({"clip_mean": t["clip_mean"][:, :5]}),
        lambda t: t.update({"clip_mean": t["clip_mean"] * np.nan}),
        lambda t: t.update({"clip_std": t["clip_std"] * 0}),
        lambda t: t.update({"clip_std": np.ones((1, 24), np.int64)}),
    ],
)
def test_statistics_that_are_broken(karlo, tmp_path, capsys, change):
    folder = shutil.copytree(karlo, tmp_path / "karlo")
    path = folder / "prior" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)
    assert main(["convert", "karlo", str(folder), str(tmp_path / "run")]) == 2
    assert "is not what it should be, 24 finite numbers" in capsys.readouterr().err


def test_a_tensor_in_two_files(whole):
    one = open_tensors(whole / "model.safetensors")
    with pytest.raises(WeightsError, match="is in more than one of"):
        joined([("", one), ("", one)])


def test_a_tokenizer_of_another_length(folder, capsys):
    (folder / "tokenizer_config.json").write_text(json.dumps({"model_max_length": None, "pad_token": None}))
    assert "reads captions of 9 tokens and the tokenizer beside it makes 77" in refused(folder, capsys)


def test_open_clip_that_prepares_images_otherwise():
    config = {"model_cfg": folders.OPEN_CLIP_CONFIG, "preprocess_cfg": {"resize_mode": "squash"}}
    with pytest.raises(WeightsError, match="prepares images by resize_mode 'squash'"):
        open_clip.clip_module(config, "x")


def test_another_vocabulary_for_glide(folder, tmp_path, monkeypatch, capsys):
    folders.small_glide(monkeypatch)
    files = folders.glide_folder(tmp_path / "glide")
    assert main(["convert", "glide", str(files), str(tmp_path / "run"), "--vocabulary", str(folder)]) == 2
    assert "has 258 tokens and the vocabulary 600; give GPT-2's" in capsys.readouterr().err


def test_a_repository_that_was_fetched_before(whole, tmp_path, monkeypatch):
    class HfApi:
        def list_repo_files(self, name):
            raise ConnectionError("no network")

    def snapshot_download(name, local_files_only):
        assert local_files_only
        return str(whole)

    monkeypatch.setitem(sys.modules, "huggingface_hub", Hub(HfApi=HfApi, snapshot_download=snapshot_download))
    assert main(["convert", "clip", "openai/some-clip", str(tmp_path / "run")]) == 0
