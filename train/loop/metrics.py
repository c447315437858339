"""Where the numbers go: `metrics.jsonl`, `speed.jsonl`, TensorBoard."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dalle2_jax.checkpoint.log import METRICS_FILE, read_records
from dalle2_jax.files import write_atomically

SPEED_FILE = "speed.jsonl"


class MetricsWriter:
    """Appends one JSON object a call to `metrics.jsonl` and the same numbers to TensorBoard; a context manager.

    Opened at the step that training goes on from, it drops later lines, so that a run that was stopped and resumed
    leaves the file of one that was not. Timings, which no two runs share, go to `speed.jsonl`. With several processes
    only one is `enabled`.
    """

    def __init__(self, stage_dir: Path, step: int = 0, enabled: bool = True):
        self._enabled = enabled
        if not enabled:
            return
        from tensorboardX import SummaryWriter

        self._files = {}
        for name in (METRICS_FILE, SPEED_FILE):
            path = stage_dir / name
            kept = [record for record in read_records(path) if record["step"] <= step]
            write_atomically(path, "".join(json.dumps(record) + "\n" for record in kept))
            self._files[name] = open(path, "a", encoding="utf-8")
        self._board = SummaryWriter(str(stage_dir), purge_step=step + 1 if step else None)

    def write(self, step: int, kind: str, values: Mapping[str, float]) -> None:
        """Records numbers of one kind (`"train"`, `"validation"`, `"speed"`) at one step."""
        if not self._enabled:
            return
        clean = {name: value if math.isfinite(value) else None for name, value in values.items()}
        file = self._files[SPEED_FILE if kind == "speed" else METRICS_FILE]
        file.write(json.dumps({"step": step, "kind": kind, **clean}) + "\n")
        file.flush()
        for name, value in values.items():
            if math.isfinite(value):
                self._board.add_scalar(f"{kind}/{name}", value, step)

    def image(self, step: int, name: str, pixels: Any) -> None:
        """Shows an image, uint8 [h, w, 3], in TensorBoard."""
        if self._enabled:
            self._board.add_image(name, pixels, step, dataformats="HWC")

    def close(self) -> None:
        if self._enabled:
            for file in self._files.values():
                file.close()
            self._board.close()

    def __enter__(self) -> "MetricsWriter":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def is_recorded(stage_dir: Path, step: int, kind: str) -> bool:
    """Whether `metrics.jsonl` has numbers of one kind at one step."""
    records = read_records(stage_dir / METRICS_FILE)
    return any((record["step"], record["kind"]) == (step, kind) for record in records)
