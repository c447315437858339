"""The `dalle2` command in this process: what it writes and prints, and one sentence and code 2 for bad input."""

import json
import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dalle2_jax import __version__, cli
from tests.cascade import DECODER_SIZE, FINAL_SIZE, STEPS

PROMPT = "a small red circle on a gray background"
LONG = f"{PROMPT} {PROMPT} {PROMPT}"


@pytest.fixture(scope="module")
def run(tiny) -> str:
    return str(tiny.run_dir)


def largest(checkpoint: Path) -> Path:
    """The largest file of the averaged parameters."""
    return max((path for path in (checkpoint / "ema").rglob("*") if path.is_file()), key=lambda p: p.stat().st_size)


def damage(stage: Path) -> None:
    """Flips one bit in the averaged parameters of every checkpoint."""
    for checkpoint in (stage / "checkpoints").iterdir():
        path = largest(checkpoint)
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(bytes(data))


def test_one_picture_with_its_facts(run, tmp_path, capsys):
    out = tmp_path / "deep" / "apple.png"
    assert cli.main(["generate", run, PROMPT, "--seed", "5", "--out", str(out)]) == 0
    captured = capsys.readouterr()
    assert captured.out == f"{out}\n" and captured.err == ""
    with Image.open(out) as picture:
        assert picture.size == (FINAL_SIZE, FINAL_SIZE) and picture.mode == "RGB"
        facts = {"prompt": PROMPT, "seed": "5", "number": "0", "software": f"dalle2_jax {__version__}"}
        assert picture.text == facts
        pixels = np.asarray(picture)
    assert [path.name for path in out.parent.iterdir()] == ["apple.png"]
    # The first of several is the same picture.
    folder = tmp_path / "several"
    prompts = [PROMPT, "a large cross", "a blue circle"]
    arguments = ["generate", run, *prompts, "--seed", "5", "--out", str(folder), "--stages"]
    assert cli.main(arguments) == 0
    written = capsys.readouterr().out.split()
    assert [Path(path).name for path in written] == [
        "000_a_small_red_circle_on_a_gray_background_0.png",
        "001_a_large_cross_0.png",
        "002_a_blue_circle_0.png",
    ]
    assert len(list(folder.iterdir())) == 6
    assert np.abs(np.asarray(Image.open(written[0])).astype(int) - pixels).max() <= 1
    with Image.open(written[1].replace(".png", "_decoder.png")) as small:
        assert small.size == (DECODER_SIZE, DECODER_SIZE) and small.text["prompt"] == "a large cross"


def test_a_long_prompt_is_drawn_with_a_warning(run, tmp_path, capsys):
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        assert cli.main(["generate", run, LONG, "--out", str(tmp_path / "a.png")]) == 0
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("dalle2: warning: the prompt is longer than 12 tokens")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["generate", "nowhere", PROMPT], "there is no run at nowhere"),
        (["generate", "RUN", "  "], "the prompt is empty"),
        (["generate", "RUN", PROMPT, "--count", "0"], "--count is 0; it must be 1 or more"),
        (["generate", "RUN", PROMPT, "--seed", "-1"], "--seed is -1"),
        (["generate", "RUN", LONG, "--strict"], "this part is cut"),
        (
            ["generate", "RUN", PROMPT, "--count", "2", "--out", "OUT/a.png"],
            "2 pictures are to be drawn; name a folder",
        ),
        (["generate", "RUN", PROMPT, "--out", "FILE"], "is a file; give another name"),
        (["generate", "RUN", PROMPT, "--steps", "many"], "many"),
        (["generate", "RUN", PROMPT, "--steps", "5000"], "5000"),
        (["generate", "DAMAGED", PROMPT], "no checkpoint is left"),
        (["describe", "nowhere"], "there is no trained stage in nowhere"),
        (["evaluate", "nowhere"], "there is no run at nowhere"),
        (["evaluate", "RUN", "--count", "-3"], "--count is -3"),
    ],
)
def test_bad_input_is_one_sentence(run, tmp_path, monkeypatch, capsys, arguments, sentence):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("kept")
    if "DAMAGED" in arguments:
        shutil.copytree(run, tmp_path / "damaged")
        damage(tmp_path / "damaged" / "decoder")
    places = {"RUN": run, "DAMAGED": "damaged", "FILE": "file", "OUT/a.png": "out/a.png"}
    before = sorted(tmp_path.rglob("*"))
    assert cli.main([places.get(argument, argument) for argument in arguments]) == 2
    captured = capsys.readouterr()
    lines = captured.err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("dalle2: ") and sentence in lines[0] and captured.out == ""
    assert sorted(tmp_path.rglob("*")) == before and (tmp_path / "file").read_text() == "kept"


def test_a_damaged_checkpoint_falls_back(run, tmp_path, capsys, caplog):
    shutil.copytree(run, tmp_path / "run")
    stage = tmp_path / "run" / "decoder"
    shutil.rmtree(stage / "checkpoints" / "2")
    shutil.copytree(stage / "checkpoints" / "4", stage / "checkpoints" / "5")
    shutil.move(stage / "checkpoints" / "4", stage / "checkpoints" / "3")
    path = largest(stage / "checkpoints" / "5")
    path.write_bytes(path.read_bytes()[:-1])
    out = tmp_path / "a.png"
    assert cli.main(["generate", str(tmp_path / "run"), PROMPT, "--seed", "5", "--out", str(out)]) == 0
    assert "damaged" in caplog.text and "using step 3 instead" in caplog.text and out.is_file()


def test_describe(run, tiny, capsys):
    assert cli.main(["describe", run]) == 0
    text = capsys.readouterr().out
    assert text.startswith(f"{run}: 4 stages\n") and max(len(line) for line in text.splitlines()[1:]) < 130
    for name in tiny.system.stages:
        assert f"{name} ({name}): finished, {STEPS} of {STEPS} steps" in text
    assert "DiffusionPrior(embedding_size=8, width=16," in text and "8 px to 16 px" in text
    assert "captioned_shapes" in text and "step 4 (" in text and "jax " in text


def test_evaluate_writes_the_report(run, tmp_path, capsys):
    shutil.copytree(run, tmp_path / "run")
    assert cli.main(["evaluate", str(tmp_path / "run"), "--count", "3"]) == 0
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["captions"] == 3 and report["captions_unseen_pairs"] == 3 and report["version"] == __version__
    for name in ("oracle", "oracle_embedding_only", "oracle_other_embedding", "oracle_unseen_pairs", "chance"):
        assert set(report[name]) == {"color", "background", "shape", "size", "all"}
        assert all(0 <= value <= 1 for value in report[name].values())
    assert report["oracle_real_pictures"]["all"] == 1.0
    assert set(report["retrieval"]) == {f"{a}_r{k}" for a in ("image_to_text", "text_to_image") for k in (1, 5)}
    assert set(report["prior"]["healthy"]) == set(report["prior"]["healthy_ranges"])
    gain = report["upsampler"]["psnr"] - report["upsampler"]["psnr_bicubic"]
    assert report["upsampler"]["gain_db"] == pytest.approx(gain)
    assert set(report["seconds"]) == {"clip", "prior", "decoder", "upsampler"}
    with Image.open(tmp_path / "run" / "samples.png") as sheet:
        assert sheet.width > 6 * 96 and sheet.height > 3 * 96  # real, decoder and final of three and three captions
    text = capsys.readouterr().out
    assert "3 test captions" in text and "3 unseen pairs" in text and "CLIP retrieval" in text and "dB" in text


def test_evaluate_of_other_data_is_refused(run, tmp_path, capsys):
    shutil.copytree(run, tmp_path / "run")
    path = tmp_path / "run" / "clip" / "stage.json"
    info = json.loads(path.read_text())
    info["data"]["fields"]["name"] = "mnist"
    path.write_text(json.dumps(info))
    assert cli.main(["evaluate", str(tmp_path / "run")]) == 2
    assert "was trained on mnist; the oracle reads only captioned_shapes" in capsys.readouterr().err
    assert not (tmp_path / "run" / "report.json").exists()
