"""Training in several processes over loopback, each with some of a machine's CPU devices."""

import os
import socket
import subprocess
import sys
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


@dataclass
class Process:
    """One that is running, and what it has said so far."""

    popen: subprocess.Popen
    said: list[str] = field(default_factory=list)
    spoke: threading.Condition = field(default_factory=threading.Condition)

    def read(self) -> None:
        for line in self.popen.stdout:
            with self.spoke:
                self.said.append(line)
                self.spoke.notify_all()

    @property
    def text(self) -> str:
        return "".join(self.said)

    def wait_for(self, text: str, seconds: float = 120) -> None:
        """Returns when it has said `text`."""
        with self.spoke:
            assert self.spoke.wait_for(lambda: text in self.text, seconds), f"{text!r} never came:\n{self.text}"

    def end(self, seconds: float = 120) -> int:
        """Its exit code, once it has ended."""
        code = self.popen.wait(seconds)
        self.reader.join(10)
        return code


def train(place: Path, config: Path, arguments: Sequence[str], devices: Sequence[int], **variables: str) -> list[Process]:
    """Starts as many processes as there are `devices`, with so many each; with one, it is a process of its own."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    started = []
    for index, count in enumerate(devices):
        environment = {
            **os.environ,
            "DALLE2_DATA_DIR": str(place / "data"),
            "JAX_COMPILATION_CACHE_DIR": str(ROOT / ".cache" / "jax"),
            "JAX_PLATFORMS": "cpu",
            "JAX_NUM_CPU_DEVICES": str(count),
            "PYTHONUNBUFFERED": "1",
            **variables,
        }
        command = [sys.executable, "-m", "train", str(config), *arguments]
        if len(devices) > 1:
            command += ["--coordinator", f"127.0.0.1:{port}", "--processes", str(len(devices)), "--process", str(index)]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        process = Process(subprocess.Popen(command, cwd=ROOT, env=environment, **pipes))
        process.reader = threading.Thread(target=process.read, daemon=True)
        process.reader.start()
        started.append(process)
    return started
