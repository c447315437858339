"""The example of docs/architecture.md, as it is used: a config outside the repository is trained and resumed."""

import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from dalle2_jax.checkpoint import CheckpointError, checkpoint_steps, load_params, load_stage, read_record
from dalle2_jax.checkpoint.store import load_part

ROOT = Path(__file__).resolve().parents[2]
FIELDS = ("gan.steps=6", "gan.validate_every=3", "gan.preview_every=6", "gan.checkpoint_every=3", "gan.log_every=1")


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder of a user's own, with the two files of the page."""
    folder = tmp_path_factory.mktemp("own")
    nets, config = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "architecture.md").read_text(), re.DOTALL)
    (folder / "gan_nets.py").write_text(nets)
    (folder / "gan.py").write_text(config)
    return folder


def train(place: Path, run: str, *words: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "train", place / "gan.py", "gan", "--run", run, "--runs-dir", place / "runs"]
    settings = {"DALLE2_DATA_DIR": str(place / "data"), "PYTHONPATH": str(ROOT), "JAX_NUM_CPU_DEVICES": "2"}
    cache = {"JAX_COMPILATION_CACHE_DIR": str(ROOT / ".cache" / "jax")}
    fields = (*FIELDS, "data.counts=96,24,24,3")
    return subprocess.run(
        [*map(str, command), *fields, *words],
        cwd=place,
        env={**os.environ, **settings, **cache},
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_two_optimizers_without_captions_go_on_bit_equal(place):
    whole = train(place, "whole")
    assert whole.returncode == 0, whole.stderr
    assert (
        "its network gan_nets.GAN is not part of dalle2_jax" in whole.stdout and 'allow=("gan_nets",)' in whole.stdout
    )
    stopped = train(place, "parts", "--stop-after-steps", "3")
    assert stopped.returncode == 128 + 15 and checkpoint_steps(place / "runs" / "parts" / "gan") == [3]
    assert train(place, "parts").returncode == 0
    folders = [place / "runs" / run / "gan" for run in ("whole", "parts")]
    for part in ("params", "ema", "optimizer"):
        one, other = (load_part(folder, part)[0] for folder in folders)
        jax.tree.map(np.testing.assert_array_equal, one, other)
    record = read_record(folders[0])
    assert record.finished and record.kind == "gan" and record.tokenizer is None
    assert record.module["class"] == "gan_nets.GAN" and record.config["name"] == "gan"
    assert (folders[0] / "samples" / "step_6.png").is_file()
    # Both halves have learned, each by its own optimizer: Adam's moments of one, SGD's momentum of the other.
    moments = jax.tree_util.tree_leaves_with_path(load_part(folders[0], "optimizer")[0])
    names = {name for path, _ in moments for name in ("mu", "nu", "trace") if f"'{name}'" in jax.tree_util.keystr(path)}
    assert names == {"mu", "nu", "trace"}


def test_it_is_loaded_where_its_package_is_allowed(place, monkeypatch):
    folder = place / "runs" / "whole" / "gan"
    if not folder.exists():
        train(place, "whole")
    with pytest.raises(CheckpointError, match="'gan_nets.GAN' is not part of dalle2_jax"):
        load_stage(folder)
    monkeypatch.syspath_prepend(str(place))
    stage = load_stage(folder, allow=("gan_nets",))
    made = stage.module.apply({"params": stage.params}, np.zeros((2, 8), np.float32), method="generate")
    assert made.shape == (2, 16, 16, 3)
    jax.tree.map(np.testing.assert_array_equal, stage.params, load_params(folder))
    sys.modules.pop("gan_nets")


def test_it_is_described_and_its_fields_can_be_changed(place):
    command = [sys.executable, "-m", "train", "describe", place / "gan.py", "gan.discriminator_optimizer.momentum=0.9"]
    done = subprocess.run(
        command, cwd=place, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert "gan: 1 stage on captioned_shapes/one_object, no captions" in done.stdout
