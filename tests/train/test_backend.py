"""The settings before jax starts."""

import importlib.util
import os
import subprocess
import sys
from collections.abc import Sequence

import jax
import pytest

from train.machine import backend


def test_compiled_programs_are_kept_unless_the_user_says_where(tmp_path, monkeypatch):
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = {name: getattr(jax.config, name) for name in names}
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    monkeypatch.setenv("XLA_FLAGS", "")
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
from train.machine import backend
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
    changing = ("MALLOC_", "XLA_FLAGS")  # the tests' flags ask for other temporaries
    environment = {name: value for name, value in os.environ.items() if not name.startswith(changing)}
    faults = []
    for word in ("keep", "plain"):
        command = [sys.executable, "-c", FAULTS, word]
        faults.append(int(subprocess.run(command, env=environment, capture_output=True, check=True).stdout))
    assert faults[0] < faults[1] / 3


def test_the_users_malloc_stays(monkeypatch):
    monkeypatch.setenv("MALLOC_ARENA_MAX", "2")
    assert backend.keep_freed_memory() is False


ADAM = """
import sys
from train.machine import backend
if "join" in sys.argv: assert backend.join_loops()
import jax, jax.numpy as jnp

def adam(p, m, v, g):
    m, v = 0.9 * m + 0.1 * g, 0.99 * v + 0.01 * g * g
    return p - m / (jnp.sqrt(v) + 1e-8), m, v

x = jnp.ones((256, 256))
print(jax.jit(adam).lower(x, x, x, x).compile().as_text().count(" fusion("))
"""


def test_loops_over_the_same_arrays_are_joined():
    loops = []
    for word in ("join", "plain"):
        command = [sys.executable, "-c", ADAM, word]
        loops.append(int(subprocess.run(command, capture_output=True, check=True).stdout))
    assert loops[0] < loops[1] == 3


def test_the_users_options_and_another_jaxlib_are_heeded(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", f"--{backend.EXTRA}=xla_of_the_user=1")
    assert not backend.join_loops()
    monkeypatch.setenv("XLA_FLAGS", "--xla_of_the_user=1")
    with monkeypatch.context() as patch:
        patch.setattr(backend, "JOINED", "xla_cpu_joins_of_another_day")
        assert not backend.join_loops()
    assert os.environ["XLA_FLAGS"] == "--xla_of_the_user=1"
    assert backend.join_loops()
    assert os.environ["XLA_FLAGS"] == f"--xla_of_the_user=1 --{backend.EXTRA}={backend.JOINED}=true"


def test_jax_will_compute_where_the_user_says(monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "cuda")
    assert not backend.on_cpu()
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    assert backend.on_cpu()


def machine(monkeypatch, tmp_path, plugins: Sequence[str], device: str | None) -> None:
    """A machine with these plugins of jax and this file of a device, or none."""
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    find, known = importlib.util.find_spec, (*backend.CUDA_PLUGINS, *backend.OTHER_PLUGINS)
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name: (name if name in plugins else None) if name in known else find(name),
    )
    monkeypatch.setattr(backend, "NVIDIA_DEVICES", [tmp_path / name for name in ("nvidia0", "nvidiactl", "dxg")])
    if device is not None:
        (tmp_path / device).touch()


@pytest.mark.parametrize(
    ("plugins", "device", "cpu"),
    [
        ([], None, True),
        ([], "nvidia0", True),
        (["jax_cuda13_plugin"], None, True),
        (["jax_cuda13_plugin"], "nvidia0", False),
        (["jax_cuda12_plugin"], "nvidiactl", False),
        (["jax_cuda12_plugin"], "dxg", False),
        (["libtpu"], None, False),
        (["libtpu", "jax_cuda13_plugin"], None, False),
        (["jax_rocm7_plugin"], None, False),
    ],
)
def test_jax_will_compute_on_the_cpu(monkeypatch, tmp_path, plugins, device, cpu):
    machine(monkeypatch, tmp_path, plugins, device)
    assert backend.on_cpu() == cpu


def test_jax_looks_for_a_gpu_where_we_do():
    hardware = pytest.importorskip("jax._src.hardware_utils")
    assert set(getattr(hardware, "_NVIDIA_GPU_DEVICES", backend.NVIDIA_DEVICES)) == set(backend.NVIDIA_DEVICES)


@pytest.mark.parametrize(
    ("plugins", "device", "platforms"),
    [([], None, None), (["jax_cuda13_plugin"], None, "cpu"), (["jax_cuda13_plugin"], "nvidia0", None)],
)
def test_a_plugin_without_a_gpu_leaves_jax_on_the_cpu(monkeypatch, tmp_path, plugins, device, platforms):
    machine(monkeypatch, tmp_path, plugins, device)
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("XLA_FLAGS", "")
    backend.setup()
    assert os.environ.get("JAX_PLATFORMS") == platforms


def test_the_cpu_unless_the_user_says_otherwise(monkeypatch):
    before = jax.config.jax_platforms
    try:
        monkeypatch.delenv("JAX_PLATFORMS")
        jax.config.update("jax_platforms", None)
        backend.compute_on_cpu()
        assert os.environ["JAX_PLATFORMS"] == jax.config.jax_platforms == "cpu"
        monkeypatch.setenv("JAX_PLATFORMS", "cuda,cpu")
        jax.config.update("jax_platforms", "cuda,cpu")
        backend.compute_on_cpu()
        assert os.environ["JAX_PLATFORMS"] == jax.config.jax_platforms == "cuda,cpu"
    finally:
        jax.config.update("jax_platforms", before)
