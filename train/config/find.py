"""Finding a config and its stages by name."""

from __future__ import annotations

import importlib.util
import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dalle2_jax.errors import InputError, nearest

ROOT = Path(__file__).resolve().parents[2]


def find_config(name: str) -> Path:
    """The config's file; `shapes` and `configs/shapes` are found too.

    Raises:
        InputError: naming the nearest one there is.
    """
    for path in (Path(name), Path(f"{name}.py"), ROOT / "configs" / f"{name}.py"):
        if path.suffix == ".py" and path.is_file():
            return path
    known = sorted(path.stem for path in (ROOT / "configs").glob("*.py") if not path.stem.startswith("_"))
    raise InputError(f"there is no config {name!r}; the nearest is configs/{nearest(Path(name).stem, known)}.py")


def find_stage(name: str, system: Any) -> str:
    """The stage's name, checked.

    Raises:
        InputError: naming the nearest one there is.
    """
    if name in system.stages:
        return name
    if name in system.given:
        raise InputError(
            f"{name} is given to {system.name} as it is in {system.given[name]}; the stages that it trains are "
            f"{', '.join(system.stages)}"
        )
    known = [*system.stages, "all"]
    raise InputError(
        f"there is no stage {name!r} in {system.name}: it has {', '.join(known)}; the nearest is "
        f"{nearest(name, known)!r}"
    )


def load_config(path: Path) -> Callable[..., Any]:
    """The function `system(...)` of a config file.

    Files beside a config of your own can be imported by it, and by the name of its file it can be imported again.

    Raises:
        InputError: if the file defines no such function.
    """
    own = path.resolve().parent == ROOT / "configs"
    name = f"configs.{path.stem}" if own else path.stem
    if not own:
        known = sys.modules.get(name)
        if known is not None and not callable(getattr(known, "system", None)):
            raise InputError(f"{path} has the name of the module {name!r}, which is another one; rename the file")
        if (folder := str(path.resolve().parent)) not in sys.path:
            sys.path.insert(0, folder)
    spec = importlib.util.spec_from_file_location(name, path.resolve())
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    if not callable(getattr(module, "system", None)):
        raise InputError(f"{path} defines no function system() and so is not a config")
    return module.system


def arguments_of(make_system: Callable[..., Any]) -> list[str]:
    """The names of what a config's function wants to know."""
    return list(inspect.signature(make_system).parameters)
