"""The numbers that training writes into a stage's folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

METRICS_FILE = "metrics.jsonl"


def read_records(path: str | Path) -> list[dict[str, Any]]:
    """The lines of a `metrics.jsonl`, without one that a kill cut short; none where there is no such file."""
    path, records = Path(path), []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict):
            records.append(record)
    return records
