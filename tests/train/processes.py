"""Training in processes of their own, through the command line, to be killed or told to stop."""

import hashlib
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

SLOW_SAVES = """
import os, time
from dalle2_jax.checkpoint import store

pause = float(os.environ.get("SLOW_SAVES", "0"))
if pause:
    write_checksums = store.write_checksums

    def slow(path):
        print(f"saving {path.name}", flush=True)
        time.sleep(pause)
        write_checksums(path)

    store.write_checksums = slow
"""


def start(place: Path, config: str, stage: str, run: str, slow_saves: float = 0.0) -> subprocess.Popen:
    """Trains by a config's text, with data and runs below `place`; `slow_saves` are seconds that each save waits."""
    path = place / f"config_{hashlib.sha1(config.encode()).hexdigest()[:8]}.py"
    path.write_text(SLOW_SAVES + config)
    environment = {
        **os.environ,
        "DALLE2_DATA_DIR": str(place / "data"),
        "JAX_COMPILATION_CACHE_DIR": str(ROOT / ".cache" / "jax"),
        "JAX_PLATFORMS": "cpu",
        "SLOW_SAVES": str(slow_saves),
        "PYTHONUNBUFFERED": "1",
    }
    command = [sys.executable, "-m", "train", str(path), stage, "--run", run, "--runs-dir", str(place / "runs")]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, cwd=ROOT, env=environment, **pipes)


def wait_for(process: subprocess.Popen, text: str) -> list[str]:
    """The process's lines up to the first one with `text`."""
    lines = []
    for line in process.stdout:
        lines.append(line)
        if text in line:
            return lines
    raise AssertionError(f"{text!r} never came:\n{''.join(lines)}")


def finish(process: subprocess.Popen) -> tuple[int, str]:
    """Its exit code and the rest of what it said."""
    output = process.communicate(timeout=300)[0]
    return process.returncode, output
