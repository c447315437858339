"""Shared test settings: 8 simulated CPU devices, no silent broadcasting, a compilation cache shared by all tests."""

import functools
import gc
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
# Tests compile far longer than they compute: these make the programs slower and compile them in half the time or less.
QUICK = {
    "xla_backend_optimization_level": "0",
    "xla_llvm_disable_expensive_passes": "true",
    "xla_cpu_use_fusion_emitters": "false",
    "xla_cpu_parallel_codegen_split_count": "1",
}

import jax
import pytest

from train.machine.compiler import jaxlib_knows

given = os.environ.get("XLA_FLAGS", "")
quick = (f"--{name}={value}" for name, value in QUICK.items() if name not in given and jaxlib_knows(name))
os.environ["XLA_FLAGS"] = " ".join((given, *quick)).strip()

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")
CACHE = Path(__file__).resolve().parent.parent / ".cache" / "jax"
jax.config.update("jax_compilation_cache_dir", os.environ.get("JAX_COMPILATION_CACHE_DIR") or str(CACHE))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)


# Tracing makes many objects and few cycles, and by itself Python spends a seventh of it on looking for those.
gc.set_threshold(20_000, 20, 20)

# Files that take the longest, which are run first: of two workers, none is left alone with one of them at the end.
LONGEST = (
    "test_cli.py",
    "weights/test_sources.py",
    "train/test_meshes.py",
    "train/test_loop.py",
    "train/test_hosts.py",
    "test_lowering.py",
    "train/test_stages.py",
    "decoder/test_overfit.py",
    "train/test_given.py",
    "test_unclip.py",
    "train/test_resume.py",
    "train/test_own_system.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    place = {Path(__file__).parent / name: number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path, len(LONGEST)))


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
    """Whether a file's tests ask for `tiny`, or a fixture of their folder does."""
    shared = file.parent / "conftest.py"
    files = [file, *([shared] if shared != Path(__file__) and shared.exists() else [])]
    return any(re.search(r"def \w+\([^)]*\btiny\b", one.read_text(encoding="utf-8")) for one in files)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> Cascade:
    """The whole cascade, trained for four steps a stage once for all tests."""
    from tests import cascade

    folder = tmp_path_factory.mktemp("tiny")
    system = cascade.tiny_system(folder / "data")
    result, log = cascade.train(system, folder / "runs" / "tiny")
    assert result.finished
    return Cascade(system, folder / "runs" / "tiny", log)
