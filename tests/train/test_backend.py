"""The settings before jax starts."""

import os
import subprocess
import sys

import jax
import pytest

from train import backend


def test_compiled_programs_are_kept_unless_the_user_says_where(tmp_path, monkeypatch):
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = {name: getattr(jax.config, name) for name in names}
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    try:
        backend.setup(cache=tmp_path / "kept")
        assert jax.config.jax_compilation_cache_dir == str(tmp_path / "kept")
        monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "elsewhere")
        backend.setup(cache=tmp_path / "other")
        assert jax.config.jax_compilation_cache_dir == str(tmp_path / "kept")
    finally:
        for name, value in before.items():
            jax.config.update(name, value)


FAULTS = """
import resource, sys
from train import backend
if "keep" in sys.argv: assert backend.keep_freed_memory()
import jax, jax.numpy as jnp
step = jax.jit(lambda x: jnp.tanh(x @ x.T) @ x)  # with temporaries of 64 MiB
x = jnp.ones((4096, 64))
for number in range(20):
    step(x).block_until_ready()
    if number == 3: before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="it is glibc's memory")
def test_freed_memory_is_kept():
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    faults = []
    for word in ("keep", "plain"):
        command = [sys.executable, "-c", FAULTS, word]
        faults.append(int(subprocess.run(command, env=environment, capture_output=True, check=True).stdout))
    assert faults[0] < faults[1] / 3


def test_the_users_malloc_stays(monkeypatch):
    monkeypatch.setenv("MALLOC_ARENA_MAX", "2")
    assert backend.keep_freed_memory() is False


def test_jax_will_compute_on_the_cpu(monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "cuda")
    assert not backend.on_cpu()
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    assert backend.on_cpu()
