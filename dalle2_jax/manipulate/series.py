"""Images that belong together, each with a label: what every manipulation returns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dalle2_jax.errors import InputError


@dataclass(frozen=True)
class Series:
    """Labelled images in reading order.

    Fields:
        images: uint8 `[n, h, w, 3]`. labels: n of them. columns: how many stand side by side. given: n images of any
        size of which these were made, which the sheet shows above them; None: it shows none.
    """

    images: np.ndarray
    labels: tuple[str, ...]
    columns: int
    given: Sequence[np.ndarray] | None = None

    def __post_init__(self) -> None:
        if len(self.images) != len(self.labels):
            raise InputError(f"{len(self.labels)} labels were given for {len(self.images)} images; give one an image")

    def __len__(self) -> int:
        return len(self.images)

    def sheet(self, cell: int | None = None) -> Any:
        """The images in rows of `columns`, each above its label, as a PIL image; cell: see `caption_grid`."""
        from dalle2_jax.images.sheet import caption_grid

        if self.given is None:
            return caption_grid(self.images, self.labels, columns=self.columns, cell=cell)
        groups, names = [self.given, self.images], ("given", "decoded")
        return caption_grid(groups, self.labels, columns=self.columns, cell=cell, labels=names)
