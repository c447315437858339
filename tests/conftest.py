"""Shared test settings: 8 simulated CPU devices, no silent broadcasting, a compilation cache shared by all tests."""

import functools
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
# Tests compile far longer than they compute; without LLVM's optimisations they compile in half the time.
if "xla_backend_optimization_level" not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_backend_optimization_level=0".strip()

import jax
import pytest

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_compilation_cache_dir", str(Path(__file__).resolve().parent.parent / ".cache" / "jax"))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


@dataclass(frozen=True)
class Cascade:
    """A run of the shrunk system (`tests.cascade`): the system, its folder with a folder a stage, and the log."""

    system: Any
    run_dir: Path
    log: list[str]


@pytest.hookimpl(optionalhook=True)  # of pytest-xdist
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """A file's tests run in one process, and all files that use `tiny` in the same one, so that it is trained once."""
    from xdist.scheduler import LoadFileScheduling

    class Scheduling(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = super()._split_scope(nodeid)
            return "tiny" if _uses_tiny(config.rootpath / file) else file

    return Scheduling(config, log)


@functools.cache
def _uses_tiny(file: Path) -> bool:
    return re.search(r"def \w+\([^)]*\btiny\b", file.read_text(encoding="utf-8")) is not None


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> Cascade:
    """The whole cascade, trained for four steps a stage once for all tests."""
    from tests import cascade

    folder = tmp_path_factory.mktemp("tiny")
    system = cascade.tiny_system(folder / "data")
    result, log = cascade.train(system, folder / "runs" / "tiny")
    assert result.finished
    return Cascade(system, folder / "runs" / "tiny", log)
