"""NVIDIA's chips as XLA is told of them: the table against what NVIDIA and CUDA say, the text, the topologies."""

import importlib.metadata
import importlib.util
import re
from types import SimpleNamespace

import jax
import jaxlib
import pytest
from jax.experimental import topologies

from train.machine import backend
from train.step.nvidia import CHIPS
from train.step.peaks import PEAKS
from train.step.topology import check_cuda_plugin, device_memory, prepare, topology_mesh

# GiB as sold; float32 TFLOPs without tensor cores, TB/s, of the data sheets (B200: an eighth of an HGX board's).
SHEETS = {"a100": (80, 19.5, 2.04), "h100": (80, 67, 3.35), "h200": (141, 67, 4.8), "b200": (180, 75, 7.75)}
# By compute capability, of the CUDA programming guide: KiB of shared memory a multiprocessor, a block.
SHARED = {8: (164, 163), 9: (228, 227), 10: (228, 227)}
# Dense bfloat16 operations a clock and multiprocessor.
PRODUCTS = {8: 2048, 9: 4096, 10: 8192}


def number(name: str, text: str) -> float:
    return float(re.search(rf"\b{name}: ([\d.]+)", text)[1])


@pytest.mark.parametrize("name", CHIPS)
def test_the_text_says_what_the_data_sheets_say(name):
    text = CHIPS[name].target_config
    sold, tflops, bandwidth = SHEETS[name]
    # Two operations a unit and clock.
    computed = 2e9 * number("core_count", text) * number("fpus_per_core", text) * number("clock_rate_ghz", text)
    assert computed == pytest.approx(tflops * 1e12, rel=0.01)
    assert number("memory_bandwidth", text) == pytest.approx(bandwidth * 1e12, rel=0.01)
    # CUDA reports a little less than is there.
    assert 0.98 * sold < number("device_memory_size", text) / 2**30 < sold
    a_core, a_block = SHARED[int(number("major", text))]
    assert number("shared_memory_per_core", text) == a_core * 1024
    assert number("shared_memory_per_block_optin", text) == a_block * 1024
    assert number("l2_cache_size", text) % 2**20 == 0 and number("l2_cache_size", text) >= 40 * 2**20


@pytest.mark.parametrize("name", CHIPS)
def test_the_kind_is_one_whose_peak_is_known(name):
    chip = CHIPS[name]
    # The peak is stated at a clock a little below the highest.
    products = chip.cores * chip.clock * 1e9 * PRODUCTS[chip.capability[0]]
    assert 0.9 < PEAKS[chip.device_kind] / products < 1.01
    assert CHIPS[name].target_config.count(f'"{chip.device_kind}"') == 2


@pytest.mark.parametrize("name", CHIPS)
def test_the_text_is_a_proto_with_each_field_once(name):
    lines = [line.strip() for line in CHIPS[name].target_config.splitlines()]
    fields = [line.split(":")[0] for line in lines if ":" in line and "{" not in line]
    assert len(fields) == len(set(fields)) > 25
    assert sum(line.count("{") - line.count("}") for line in lines) == 0
    accelerated = "ACCELERATED_FEATURES" in CHIPS[name].target_config
    assert accelerated == (name != "a100"), "sm_90a, sm_100a; sm_80 alone has none of its own"


@pytest.mark.parametrize(("name", "gib"), [("a100", 78), ("h100", 78), ("h200", 138), ("b200", 177)])
def test_the_memory_that_programs_may_use(name, gib):
    absent = SimpleNamespace(device_kind=CHIPS[name].device_kind, memory_stats=lambda: None)
    assert device_memory(absent) == gib * 2**30
    there = SimpleNamespace(device_kind=CHIPS[name].device_kind, memory_stats=lambda: {"bytes_limit": 5})
    assert device_memory(there) == 5, "what a device says goes before the table"


@pytest.fixture
def asked(monkeypatch) -> list[dict]:
    """With a plugin of jaxlib's version; what jax is asked for, answered with the CPU's devices."""
    calls = []

    def answer(**arguments):
        calls.append(arguments)
        return SimpleNamespace(devices=jax.devices())

    plugin(monkeypatch, jaxlib.__version__)
    monkeypatch.setattr(topologies, "get_topology_desc", answer)
    return calls


def plugin(monkeypatch, version: str | None) -> None:
    find, say = importlib.util.find_spec, importlib.metadata.version
    name = "jax_cuda13_plugin"
    monkeypatch.setattr(importlib.util, "find_spec", lambda module: version if module == name else find(module))
    monkeypatch.setattr(
        importlib.metadata, "version", lambda module: version if module == name.replace("_", "-") else say(module)
    )


@pytest.mark.parametrize(
    ("name", "topology"),
    [("h200:8", "1x1x8"), ("b200:2x4", "1x2x4"), ("a100:16x8", "1x16x8"), ("h100:1", "1x1x1")],
)
def test_a_name_is_hosts_and_gpus(asked, name, topology):
    mesh = topology_mesh(name)
    text = CHIPS[name.partition(":")[0]].target_config
    assert asked == [{"platform": "cuda", "topology_name": "", "target_config": text, "topology": topology}]
    assert mesh.shape == {"data": 1, "fsdp": 8, "tensor": 1}
    assert topology_mesh(name, {"data": 2, "fsdp": 2, "tensor": 2}).shape["tensor"] == 2


@pytest.mark.parametrize(
    ("name", "nearest"),
    [("h300:8", "h200"), ("h300", "h200"), ("H200:8", "h200"), ("a10:8", "a100"), ("gb200:4", "b200")],
)
def test_an_unknown_chip(asked, name, nearest):
    chip = name.partition(":")[0]
    with pytest.raises(
        ValueError, match=f"there is no chip '{chip}' to compile for: .*; the nearest is '[ab]?h?[12]00'"
    ):
        topology_mesh(name)
    assert not asked


@pytest.mark.parametrize("shape", [":0", ":banana", ":", "", ":8x", ":2x8x1", ":0x8", ":-1", ":8 "])
def test_a_wrong_number(asked, shape):
    sentence = re.escape(f"the topology 'h200{shape}' does not say how many GPUs; write h200:8 for one host's")
    with pytest.raises(ValueError, match=sentence):
        topology_mesh(f"h200{shape}")
    assert not asked


def test_without_a_plugin_and_with_that_of_another_jaxlib(monkeypatch):
    plugin(monkeypatch, None)
    install = r"run: pip install 'dalle2-jax\[cuda-compile\]'$"
    with pytest.raises(ValueError, match=f"h200:8 needs jax's CUDA plugin, which is not installed; {install}"):
        topology_mesh("h200:8")
    plugin(monkeypatch, "0.1.2")
    with pytest.raises(ValueError, match=f"jaxlib's version, which is {jaxlib.__version__}, but 0.1.2 is .*{install}"):
        topology_mesh("h200:8")
    plugin(monkeypatch, f"{jaxlib.__version__}.dev3")
    check_cuda_plugin("h200:8")


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (NotImplementedError("topology not implemented for cuda"), "set JAX_PLATFORMS=cpu before it starts"),
        (RuntimeError("no such thing\nat all"), r"refuses the topology 'h200:8': no such thing$"),
    ],
)
def test_jax_refuses(asked, monkeypatch, error, sentence):
    def refuse(**_):
        raise error

    monkeypatch.setattr(topologies, "get_topology_desc", refuse)
    with pytest.raises(ValueError, match=sentence):
        topology_mesh("h200:8")


@pytest.mark.parametrize(
    ("name", "gpu", "cpu"), [("h200:8", False, True), ("h200:8", True, False), ("v5e:4x4", False, False)]
)
def test_jax_computes_on_the_cpu_where_there_is_no_gpu(monkeypatch, name, gpu, cpu):
    calls = []
    monkeypatch.setattr(backend, "has_nvidia_gpu", lambda: gpu)
    monkeypatch.setattr(backend, "compute_on_cpu", lambda: calls.append(name))
    prepare(name)
    assert bool(calls) == cpu
