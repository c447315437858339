"""Loss curves of runs, stage by stage, from the numbers that training wrote."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dalle2_jax.checkpoint.log import METRICS_FILE, read_records
from dalle2_jax.checkpoint.run import KINDS
from dalle2_jax.errors import InputError
from dalle2_jax.images.files import save_figure

Curves = dict[str, dict[str, list[tuple[int, float]]]]


def read_curves(run_dir: str | Path) -> Curves:
    """{stage: {"train" or "validation": [(step, loss), ...]}} of a run, its stages in the order of training.

    Raises:
        InputError: where no stage in the folder has numbers.
    """
    paths = sorted(Path(run_dir).glob(f"*/{METRICS_FILE}"), key=lambda path: _place(path.parent.name))
    if not paths:
        raise InputError(f"there are no curves in {run_dir}; name a run's folder, such as runs/demo")
    return {path.parent.name: _losses(path) for path in paths}


def _place(stage: str) -> tuple[int, str]:
    known = [number for number, name in enumerate(KINDS) if stage.startswith(name)]
    return (known or [len(KINDS)])[0], stage


def _losses(path: Path) -> dict[str, list[tuple[int, float]]]:
    found: dict[str, list[tuple[int, float]]] = {"train": [], "validation": []}
    for record in read_records(path):
        kind, step, loss = (record.get(name) for name in ("kind", "step", "loss"))
        if kind in found and loss is not None:
            found[kind].append((step, loss))
    return found


def plot_curves(runs: dict[str, Curves], path: str | Path) -> None:
    """Draws one panel a stage with every run's losses, as a PNG: lines for training, dots for validation."""
    stages = sorted({stage for curves in runs.values() for stage in curves}, key=_place)

    def draw(figure: Any) -> None:
        for axes, stage in zip(figure.subplots(1, len(stages), squeeze=False)[0], stages, strict=True):
            for color, (name, curves) in enumerate(runs.items()):
                kinds = curves.get(stage, {})
                for kind, style in (("train", {"alpha": 0.8}), ("validation", {"marker": "o", "linestyle": "--"})):
                    if points := kinds.get(kind):
                        axes.plot(*zip(*points, strict=True), color=f"C{color}", label=f"{name}, {kind}", **style)
            axes.set_title(stage)
            axes.set_xlabel("step")
            axes.set_yscale("log")
            axes.grid(alpha=0.3, which="both")
            axes.legend(fontsize="small")
        figure.axes[0].set_ylabel("loss")

    save_figure(path, draw, (4 * len(stages), 3.6))
