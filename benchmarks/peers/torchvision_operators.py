"""torchvision's two operators where its own library does not load: transformers and diffusers import torchvision.

Its wheels on PyPI are for CUDA. With a torch for CPUs their library does not load, and `import torchvision` fails for
want of these operators. Where the library does load, they must not be declared before: its static initialiser would
then end the process.
"""

from __future__ import annotations

import functools
import importlib.util
from pathlib import Path
from typing import Any

SIGNATURE = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
OPERATORS = (f"nms{SIGNATURE}", f"qnms{SIGNATURE}")


@functools.cache
def declare() -> Any:
    """Declares the operators where torchvision is installed and its library does not load; once a process.

    Returns the declaring library, which torch forgets with its last reference; None if there was nothing to declare.
    """
    found = importlib.util.find_spec("torchvision")
    if found is None or found.origin is None:
        return None
    import torch

    for path in sorted(Path(found.origin).parent.glob("_C*.so")):
        try:
            torch.ops.load_library(path)
        except OSError:
            continue
        return None  # it has declared them itself
    library = torch.library.Library("torchvision", "DEF")
    for operator in OPERATORS:
        library.define(operator)
    return library
