"""The `dalle2` command in this process: what it writes and prints, and one sentence and code 2 for bad input."""

import dataclasses
import json
import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dalle2_jax import __version__, cli
from dalle2_jax.checkpoint import CheckpointError
from dalle2_jax.data.dataset import open_source
from dalle2_jax.data.sources.folder import read_folder
from dalle2_jax.evaluation.curves import read_curves
from dalle2_jax.unclip import DALLE2
from tests.cascade import DECODER_SIZE, FINAL_SIZE, STEPS

PROMPT = "a small red circle on a gray background"
LONG = f"{PROMPT} {PROMPT} {PROMPT}"
NO_CLIP = "this run has no clip, which encodes captions and images; its stages are: "


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


def test_one_image_with_its_facts(run, tmp_path, capsys):
    out = tmp_path / "deep" / "apple.png"
    assert cli.main(["generate", run, PROMPT, "--seed", "5", "--out", str(out)]) == 0
    captured = capsys.readouterr()
    assert captured.out == f"{out}\n" and captured.err == ""
    with Image.open(out) as image:
        assert image.size == (FINAL_SIZE, FINAL_SIZE) and image.mode == "RGB"
        facts = {"prompt": PROMPT, "seed": "5", "software": f"dalle2_jax {__version__}"}
        assert image.text == facts
        pixels = np.asarray(image)
    assert [path.name for path in out.parent.iterdir()] == ["apple.png"]
    # The first of several is the same image.
    folder = tmp_path / "several"
    prompts = [PROMPT, "a large cross", "a blue circle", "a cross"]
    arguments = ["generate", run, *prompts, "--seed", "5", "--out", str(folder), "--stages"]
    assert cli.main(arguments) == 0
    written = capsys.readouterr().out.split()
    assert [Path(path).name for path in written] == [
        "000_a_small_red_circle_on_a_gray_background_5.png",
        "001_a_large_cross_5.png",
        "002_a_blue_circle_5.png",
        "003_a_cross_5.png",
    ]
    assert len(list(folder.iterdir())) == 8
    assert np.abs(np.asarray(Image.open(written[0])).astype(int) - pixels).max() <= 1
    with Image.open(written[1].replace(".png", "_decoder.png")) as small:
        assert small.size == (DECODER_SIZE, DECODER_SIZE) and small.text["prompt"] == "a large cross"


def test_a_long_prompt_is_drawn_with_a_warning(run, tmp_path, capsys):
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        assert cli.main(["generate", run, LONG, "--out", str(tmp_path / "a.png")]) == 0
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("dalle2: warning: the prompt is longer than 12 tokens")


def pixels_of(path: str | Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image).astype(int)


def test_prompts_of_a_file_and_seeds_that_make_each_image_again(run, tmp_path, capsys):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\ufeff# what to draw\na small red circle\n\nü 緑 ok\n", encoding="utf-8")
    many = [
        *("generate", run, "--prompts", str(prompts), "--count", "3", "--seed", "7"),
        *("--batch-size", "4", "--out", str(tmp_path / "many")),
    ]
    assert cli.main(many) == 0
    captured = capsys.readouterr()
    written = [Path(path) for path in captured.out.split()]
    assert [path.name for path in written] == [
        *(f"000_a_small_red_circle_{seed}.png" for seed in (7, 8, 9)),
        *(f"001_ü_緑_ok_{seed}.png" for seed in (7, 8, 9)),
    ]
    assert [line.split(" |")[0] for line in captured.err.splitlines() if "images" in line] == [
        "4/6 images",
        "6/6 images",
    ]
    with Image.open(written[4]) as image:
        assert image.text["prompt"] == "ü 緑 ok" and image.text["seed"] == "8"
    assert len({pixels_of(path).tobytes() for path in written}) == 6
    # Alone, by its own seed.
    alone = tmp_path / "alone.png"
    assert cli.main(["generate", run, "a small red circle", "--seed", "9", "--out", str(alone)]) == 0
    assert np.abs(pixels_of(alone) - pixels_of(written[2])).max() <= 1


def test_a_sheet(run, tmp_path, capsys):
    out = tmp_path / "sheet.png"
    arguments = ["generate", run, PROMPT, "a large cross", "--count", "2", "--grid", "--out", str(out)]
    assert cli.main(arguments) == 0
    assert capsys.readouterr().out == f"{out}\n"
    with Image.open(out) as sheet:
        assert sheet.text["prompts"] == f"{PROMPT}\na large cross" and min(sheet.size) > 2 * 96
    assert [path.name for path in tmp_path.iterdir()] == ["sheet.png"]


def test_ctrl_c_keeps_what_is_done(run, tmp_path, capsys, monkeypatch):
    generate, calls = DALLE2.generate, []

    def interrupted(self, *arguments, **settings):
        calls.append(arguments)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return generate(self, *arguments, **settings)

    monkeypatch.setattr(DALLE2, "generate", interrupted)
    arguments = ["generate", run, PROMPT, "--count", "12", "--batch-size", "4"]
    assert cli.main([*arguments, "--out", str(tmp_path / "files")]) == 130
    captured = capsys.readouterr()
    assert "stopped; 8 of 12 images are sampled" in captured.err and "Traceback" not in captured.err
    assert sorted(path.suffix for path in (tmp_path / "files").iterdir()) == [".png"] * 8
    calls.clear()
    assert cli.main([*arguments, "--grid", "--out", str(tmp_path / "sheet.png")]) == 130
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.height < 2 * (96 + 60)


def test_a_stage_is_sampled_as_the_options_say(run, tmp_path, monkeypatch):
    seen = {}
    generate = DALLE2.generate

    def recording(self, *arguments, **settings):
        seen.update(settings)
        return generate(self, *arguments, **settings)

    monkeypatch.setattr(DALLE2, "generate", recording)
    out = tmp_path / "a.png"
    options = ["--sampler", "dpmpp_2m", "--sampler", "prior=ddpm", "--steps", "4", "--steps", "upsampler=3"]
    options += ["--guidance-scale", "2", "--guidance-interval", "0.1,0.9", "--candidates", "prior=1", "--tile", "12"]
    options += ["--threshold", "dynamic", "--variance", "prior=analytic"]
    assert cli.main(["generate", run, PROMPT, *options, "--out", str(out)]) == 0
    assert seen["decoder"] == {
        "sampler": "dpmpp_2m",
        "steps": "4",
        "guidance_scale": 2.0,
        "guidance_interval": (0.1, 0.9),
        "threshold": "dynamic",
    }
    assert seen["prior"] == {"sampler": "ddpm", "candidates": 1, "variance": "analytic"}
    assert seen["upsampler"] == {"steps": "3"} and seen["tile"] == 12 and out.is_file()


def test_an_upsampler_by_itself(run, tmp_path, capsys):
    image = tmp_path / "photo.jpg"
    Image.new("L", (40, 24), 120).save(image)
    stage = str(Path(run) / "upsampler")
    assert cli.main(["upsample", stage, str(image), "--steps", "2"]) == 0
    out = tmp_path / "photo_large.png"
    assert capsys.readouterr().out == f"{out}\n"
    with Image.open(out) as large:
        assert large.size == (FINAL_SIZE, FINAL_SIZE) and large.text["source"] == "photo.jpg"
    for arguments, sentence in (
        ([str(Path(run) / "clip"), str(image)], "is a trained clip; name an upsampler's folder"),
        ([stage, str(out.with_name("none.png"))], "No such file"),
        ([stage, str(image), "--out", str(tmp_path)], "is no PNG"),
        ([stage, str(image), "--steps", "prior=3"], "only the upsampler is at work here"),
        ([stage, __file__], "is no image that can be read: it is not an image"),
    ):
        assert cli.main(["upsample", *arguments]) == 2
        shown = capsys.readouterr().err
        assert sentence in shown and shown.count("\n") == 1


def test_a_sweep(run, tmp_path, capsys):
    out = tmp_path / "sweep"
    options = ["--samplers", "dpmpp_2m", "--steps", "2", "--guidance-scales", "1,2", "--count", "4"]
    assert cli.main(["sweep", run, *options, "--out", str(out)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[:4] == ["sampler", "steps", "guidance_scale", "evaluations"] and len(lines) == 5
    report = json.loads((tmp_path / "sweep.json").read_text())
    rows = {(row["sampler"], row["guidance_scale"]): row for row in report["rows"]}
    assert rows.keys() == {("dpmpp_2m", 1.0), ("dpmpp_2m", 2.0)}
    assert rows["dpmpp_2m", 1.0]["evaluations"] == 2 and rows["dpmpp_2m", 2.0]["evaluations"] == 4
    assert all(0 <= row["all"] <= 1 and row["seconds"] > 0 for row in report["rows"])
    with Image.open(tmp_path / "sweep.png") as plot:
        assert plot.width > 500


def test_curves(run, tmp_path, capsys):
    curves = read_curves(run)
    assert [*curves] == ["clip", "prior", "decoder", "upsampler"]
    assert [step for step, _ in curves["prior"]["train"]] == list(range(1, STEPS + 1))
    assert [step for step, _ in curves["decoder"]["validation"]] == [STEPS]
    other = shutil.copytree(run, tmp_path / "other")
    with open(other / "clip" / "metrics.jsonl", "a") as file:
        file.write('{"step": 5, "ki')  # cut short by a kill
    assert read_curves(other) == curves
    out = tmp_path / "curves.png"
    assert cli.main(["curves", run, str(other), "--out", str(out)]) == 0
    assert capsys.readouterr().out == f"wrote {out}\n"
    with Image.open(out) as image:
        assert image.width > 3 * image.height


def test_a_folder_is_checked(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "pets"
    folder.mkdir()
    for number in range(5):
        Image.new("RGB", (40 + number, 60), (40 * number, 90, 200)).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(f"animal number {number}\nan animal")
    (folder / "broken.png").write_text("broken")
    (folder / "4.txt").unlink()
    assert cli.main(["data", "check", "pets"]) == 0
    text = capsys.readouterr().out
    assert "pets: 4 captioned images, " in text and "40 to 43 pixels" in text and "4 tall" in text
    assert "8, of 2 to 3 words" in text and "2 problems, all left out of training:" in text
    assert "broken.png: it is not an image" in text and "4.png: there is no 4.txt" in text
    with Image.open("pets_sheet.png") as sheet:
        assert sheet.width > 4 * 96
    assert cli.main(["data", "check", "nowhere"]) == 2
    assert capsys.readouterr().err == "dalle2: there is no folder nowhere; name one with images and captions\n"


def test_a_data_set_becomes_a_folder(tiny, tmp_path, monkeypatch, capsys):
    data = tiny.system.data  # fewer images than the command's name alone would draw
    monkeypatch.setattr("dalle2_jax.data.dataset.Data", lambda **named: dataclasses.replace(data, **named))
    out = tmp_path / "made" / "shapes"
    arguments = ["data", "export", "captioned_shapes/one_object", "validation+test", str(out), "--count", "8"]
    assert cli.main(arguments) == 0
    assert capsys.readouterr().out.endswith(f"wrote 8 images with captions to {out}\n")
    assert [path.name for path in out.parent.iterdir()] == ["shapes"] and len(list(out.iterdir())) == 16
    folder = read_folder(out)
    assert len(folder.images) == 8 and not folder.problems
    validation, test = (open_source(data, split) for split in ("validation", "test"))
    step = (len(validation) + len(test)) / 8
    for number, image in enumerate(folder.images):
        index = int(step * number)
        source, index = (validation, index) if index < len(validation) else (test, index - len(validation))
        assert image.captions == tuple(dict.fromkeys(source.captions([index])[0]))
        with Image.open(out / image.name) as pixels:
            np.testing.assert_array_equal(np.asarray(pixels), source.images([index])[0])
    assert cli.main(arguments) == 2
    assert capsys.readouterr().err == f"dalle2: {out} exists already; name a folder to make\n"
    assert cli.main([*arguments[:3], "tests", str(tmp_path / "other")]) == 2
    assert "has no split 'tests'" in capsys.readouterr().err and not (tmp_path / "other").exists()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["generate", "nowhere", PROMPT], "there is no run at nowhere"),
        (["generate", "RUN"], "there is nothing to sample; give captions in quotes"),
        (["generate", "RUN", "--prompts", "none.txt"], "--prompts none.txt cannot be read: No such file"),
        (["generate", "RUN", PROMPT, "--grid", "--out", "folder"], "--out folder is no PNG"),
        (["generate", "RUN", PROMPT, "--seed", "4294967295", "--count", "2"], "goes beyond the last seed"),
        (["generate", "RUN", PROMPT, "--sampler", "euler"], "there is no sampler 'euler'"),
        (["generate", "RUN", PROMPT, "--steps", "dekoder=3"], "there is no stage 'dekoder'; the nearest"),
        (["generate", "RUN", PROMPT, "--eta", "much"], "--eta takes a number, not 'much'"),
        (["generate", "RUN", PROMPT, "--guidance-interval", "0.5"], "--guidance-interval takes LOW,HIGH, not '0.5'"),
        (
            ["generate", "RUN", PROMPT, "--variance", "analytic"],
            "variance has no effect with the sampler ddim; take ddpm",
        ),
        (["generate", "RUN", PROMPT, "--tile", "0"], "--tile is 0"),
        (["sweep", "RUN", "--guidance-scales", "1,x"], "--guidance-scales takes numbers"),
        (["sweep", "RUN", "--samplers", "ddim,euler"], "there is no sampler 'euler'"),
        (["evaluate", "RUN", "--judge", "RUN"], "leave --judge out"),
        (["evaluate", "RUN", "--split", "train"], "leave --split out"),
        (["curves", "nowhere"], "there are no curves in nowhere; name a run's folder"),
        (["generate", "RUN", "  "], "the prompt is empty"),
        (["generate", "RUN", PROMPT, "--count", "0"], "--count is 0; it must be 1 or more"),
        (["generate", "RUN", LONG, "--strict"], "this part is cut"),
        (
            ["generate", "RUN", PROMPT, "--count", "2", "--out", "OUT/a.png"],
            "2 images are to be sampled; name a folder",
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


@pytest.mark.parametrize("seed", [-1, 2**32])
@pytest.mark.parametrize(
    "arguments",
    [
        ["generate", "nowhere", PROMPT],
        ["vary", "nowhere", "a.png"],
        ["upsample", "nowhere/upsampler", "a.png"],
        ["evaluate", "nowhere"],
        ["sweep", "nowhere"],
    ],
)
def test_seeds_are_unsigned_32_bit_numbers(capsys, arguments, seed):
    """In every command that takes one, before anything is looked for."""
    assert cli.main([*arguments, "--seed", str(seed)]) == 2
    assert capsys.readouterr().err == f"dalle2: --seed is {seed}; it must lie in 0 to 4294967295\n"


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
    for name in tiny.system.usual_stages:
        assert f"{name} ({name}): finished, {STEPS} of {STEPS} steps" in text
    assert "DiffusionPrior(embedding_size=8, width=16," in text and "8 px to 16 px" in text
    assert "captioned_shapes" in text and "step 4 (" in text and "jax " in text


@pytest.mark.parametrize(
    ("kept", "sentence"),
    [
        (["prior"], f"{NO_CLIP}prior"),
        (
            ["decoder", "upsampler"],
            "this run has no clip, which encodes captions and images; its stages are: decoder",
        ),
        (["upsampler"], "has no stage that reads captions; its stages are: upsampler"),
    ],
)
def test_memory_of_a_run_that_lacks_a_stage(run, tmp_path, capsys, kept, sentence):
    """What cannot be planned is said before anything is compiled; the last sentence is that of loading, too."""
    for name in kept:
        shutil.copytree(f"{run}/{name}", tmp_path / name)
    assert cli.main(["describe", str(tmp_path), "--memory"]) == 2
    message = capsys.readouterr()
    assert sentence in message.err and message.err.count("\n") == 1 and "GiB" not in message.out
    if kept == ["upsampler"]:
        with pytest.raises(CheckpointError, match=sentence):
            DALLE2.load(tmp_path)


def test_evaluate_writes_the_report(run, tmp_path, capsys):
    shutil.copytree(run, tmp_path / "run")
    assert cli.main(["evaluate", str(tmp_path / "run"), "--count", "3"]) == 0
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["captions"] == 3 and report["captions_unseen_pairs"] == 3 and report["version"] == __version__
    for name in ("oracle", "oracle_embedding_only", "oracle_other_embedding", "oracle_unseen_pairs", "chance"):
        assert set(report[name]) == {"color", "background", "shape", "size", "all"}
        assert all(0 <= value <= 1 for value in report[name].values())
    assert report["oracle_real_images"]["all"] == 1.0
    assert set(report["retrieval"]) == {f"{a}_r{k}" for a in ("image_to_text", "text_to_image") for k in (1, 5)}
    assert set(report["prior"]["healthy"]) == set(report["prior"]["healthy_ranges"])
    gain = report["upsampler"]["psnr"] - report["upsampler"]["psnr_bicubic"]
    assert report["upsampler"]["gain_db"] == pytest.approx(gain)
    assert set(report["seconds"]) == {"clip", "prior", "decoder", "upsampler"}
    with Image.open(tmp_path / "run" / "samples.png") as sheet:
        assert sheet.width > 6 * 96 and sheet.height > 3 * 96  # real, decoder and final of three and three captions
    text = capsys.readouterr().out
    assert "3 test captions" in text and "3 unseen pairs" in text and "CLIP retrieval" in text and "dB" in text


def test_evaluate_of_data_that_cannot_be_read_is_refused(run, tmp_path, capsys):
    shutil.copytree(run, tmp_path / "run")
    path = tmp_path / "run" / "clip" / "stage.json"
    info = json.loads(path.read_text())
    info["data"]["fields"]["name"] = "mnist"
    path.write_text(json.dumps(info))
    assert cli.main(["evaluate", str(tmp_path / "run")]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and "the data set mnist/one_object cannot be opened" in lines[0]
    assert not (tmp_path / "run" / "report.json").exists()
