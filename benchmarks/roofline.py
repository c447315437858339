"""What a case's step costs at least on an NVIDIA GPU that is not there, kernel by kernel.

    JAX_PLATFORMS=cpu python -m benchmarks.roofline prior-1b --topology h200:1
    JAX_PLATFORMS=cpu python -m benchmarks.roofline decoder-1b --step full_step --hlo decoder.hlo --out decoder.json
    python -m benchmarks.roofline --from decoder.hlo --top 40

The step is compiled for the topology, which needs jax's CUDA plugin and no GPU. Every kernel of the optimized program
is then given the longer of two times: that of its bytes at the memory's speed and that of its FLOPs at the speed of
matrix products (what is counted says hlo.py). Their sum is a bound: launches, small sizes, and kernels that reach less
come on top, and nothing is tuned, since tuning needs the GPU. Two programs of one step are compared by it; it is no
forecast. Operations between devices count as what they move within the device's own memory.

XLA's flags are those of XLA_FLAGS. With --xla_gpu_enable_triton_gemm=false all products are cuBLAS's, which helps where
XLA, left to guess, finds no tiles for one.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import json
import re
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from benchmarks import hlo
from benchmarks.cases import CASES
from benchmarks.hlo import Kernel
from benchmarks.ours import Case, make_batch, make_inputs, make_task, plain_step
from benchmarks.worker import MEASURES
from dalle2_jax.layers.fields import count_parameters
from dalle2_jax.layers.flops import count_flops
from dalle2_jax.sharding import batch_sharding, check_batch, mesh_sizes, replicate
from train.step.nvidia import CHIPS
from train.step.peaks import PEAKS
from train.step.state import abstract_state
from train.step.step import make_step
from train.step.topology import topology_mesh

CATEGORIES = {
    hlo.PRODUCT: "{} products",
    hlo.CONVOLUTION: "{} convolutions",
    hlo.ATTENTION: "cuDNN attention",
    hlo.STACK: "copies into and out of stacks",
    hlo.COLLECTIVE: "between devices",
    hlo.OTHER: "elementwise, reductions",
}
NOTE = "A bound, not a forecast: kernels that reach less, launches and waiting come on top."


@dataclass(frozen=True)
class Rates:
    """What a device reaches at best: products in bfloat16, FLOP/s, and memory, bytes/s.

    Products in float32 are made in tf32, at half the speed.
    """

    products: float
    bandwidth: float

    def seconds(self, kernel: Kernel) -> float:
        """The least time of all runs of a kernel."""
        rate = self.products / 2 if kernel.dtype == "float32" else self.products
        return kernel.times * max((kernel.read + kernel.written) / self.bandwidth, kernel.flops / rate)


# What an H200 reaches at best of its data sheet's 989 TFLOP/s and 4.8 TB/s; the others are taken to reach as much.
OF_PRODUCTS, OF_BANDWIDTH = 790 / 989, 4.3 / 4.8
RATES = {
    chip.device_kind: Rates(OF_PRODUCTS * PEAKS[chip.device_kind], OF_BANDWIDTH * chip.bandwidth)
    for chip in CHIPS.values()
}
DEFAULT_DEVICE = CHIPS["h200"].device_kind


def changed_case(name: str, text: str) -> Case:
    """A case with fields set, as `scan_layers=True,batch=16`; values are written as in Python.

    Raises:
        ValueError: if the text is not of that form, or the case has no such field.
    """
    case = CASES[name]
    try:
        call = ast.parse(f"dict({text})", mode="eval").body
        if not (isinstance(call, ast.Call) and isinstance(call.func, ast.Name)) or call.args:
            raise ValueError("a value without a name")
        fields = {word.arg: ast.literal_eval(word.value) for word in call.keywords}
    except (SyntaxError, ValueError) as error:
        raise ValueError(f"{text!r} is not of the form field=value,field=value ({error})") from error
    unknown = [field for field in fields if field not in case]
    if unknown:
        raise ValueError(f"{name} has no field {unknown[0]!r}; its fields are {', '.join(case)}")
    return {**case, **fields}


def trace_step(case: Case, measure: str, dtype: str, mesh: jax.sharding.Mesh) -> tuple[jax.stages.Traced, int]:
    """(the traced step, the number of parameters); nothing is computed.

    measure: as in `worker.MEASURES`. The trace is made under the mesh, so that what is chosen by the kind of device,
    as attention's kernel is, is chosen for the mesh's.

    Raises:
        ValueError: if the case is no single network, or its batch does not divide over the mesh.
    """
    if case["kind"] == "generate":
        raise ValueError("only a network's step is examined, not generation")
    check_batch(case["batch"], mesh)
    task = make_task(case, dtype)
    batch = make_batch(case)
    shapes = jax.eval_shape(task.init, jax.random.key(0))
    params, given = _placed(shapes, replicate(mesh)), _placed(batch, batch_sharding(mesh))
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        if measure == "forward":
            inputs = _placed(make_inputs(case, batch), batch_sharding(mesh))
            call = jax.jit(lambda params, inputs: task.module.apply({"params": params}, **inputs))
            traced = call.trace(params, inputs)
        elif measure == "train_step":
            init, step = plain_step(task, mesh)
            traced = step.trace(_placed(jax.eval_shape(init, params), replicate(mesh)), given)
        else:
            state = abstract_state(task, mesh)
            traced = make_step(task, mesh, state).trace(state, given, task.frozen)
    return traced, count_parameters(params)


def _placed(tree: Any, sharding: jax.sharding.Sharding) -> Any:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree)


def compile_case(case: Case, measure: str, dtype: str, mesh: jax.sharding.Mesh) -> tuple[dict[str, Any], str]:
    """(what the step is and needs, the optimized program's text). Raises: see `trace_step`."""
    began = time.monotonic()
    traced, parameters = trace_step(case, measure, dtype, mesh)
    was_traced = time.monotonic()
    lowered = traced.lower()
    was_lowered = time.monotonic()
    compiled = lowered.compile()
    was_compiled = time.monotonic()
    found = {
        "device_kind": mesh.devices.flat[0].device_kind,
        "devices": mesh.devices.size,
        "parameters": parameters,
        "flops": count_flops(traced.jaxpr),
        "seconds": {
            "trace": was_traced - began,
            "lower": was_lowered - was_traced,
            "compile": was_compiled - was_lowered,
        },
        "memory": _memory(compiled.memory_analysis()),
    }
    return found, compiled.as_text()


def _memory(needs: Any) -> dict[str, int]:
    """Bytes of one device; outputs are those beside the donated arguments."""
    memory = {
        "arguments": needs.argument_size_in_bytes,
        "outputs": needs.output_size_in_bytes - needs.alias_size_in_bytes,
        "temporaries": needs.temp_size_in_bytes,
    }
    # Not every version of jax tells the peak; the sum is never below it.
    return memory | {"peak": getattr(needs, "peak_memory_in_bytes", 0) or sum(memory.values())}


def category(kernel: Kernel) -> str:
    """The row of the table that a kernel belongs to."""
    return CATEGORIES[kernel.kind].format(kernel.dtype)


def analyse(text: str, rates: Rates) -> dict[str, Any]:
    """The roofline of a program's text: what it has, its categories and its kernels, the slowest first.

    Raises:
        ValueError: if the text is not that of a program.
    """
    kernels = hlo.kernels(text)
    attention = [k for k in kernels if k.kind == hlo.ATTENTION]
    between = [k for k in kernels if k.kind == hlo.COLLECTIVE]
    groups: dict[str, list[Kernel]] = {}
    for kernel in kernels:
        groups.setdefault(category(kernel), []).append(kernel)
    rows = {name: _sums(group, rates) for name, group in groups.items()}
    listed = [dataclasses.asdict(k) | {"category": category(k), "seconds": rates.seconds(k)} for k in kernels]
    return {
        "rates": dataclasses.asdict(rates),
        "attention": {
            "forward": sum(k.times for k in attention if "Backward" not in k.opcode),
            "backward": sum(k.times for k in attention if "Backward" in k.opcode),
        },
        "collectives": {name: sum(k.opcode == name for k in between) for name in sorted({k.opcode for k in between})},
        "unknown_loops": hlo.unknown_loops(text),
        "total": _sums(kernels, rates),
        "categories": dict(sorted(rows.items(), key=lambda row: -row[1]["seconds"])),
        "kernels": sorted(listed, key=lambda kernel: -kernel["seconds"]),
    }


def _sums(kernels: Iterable[Kernel], rates: Rates) -> dict[str, float]:
    kernels = list(kernels)
    return {
        "seconds": sum(rates.seconds(k) for k in kernels),
        "kernels": len(kernels),
        "launches": sum(k.times for k in kernels),
        "flops": sum(k.times * k.flops for k in kernels),
        "read": sum(k.times * k.read for k in kernels),
        "written": sum(k.times * k.written for k in kernels),
    }


def page(found: Mapping[str, Any], top: int) -> str:
    """What is printed: the step where one was compiled, the table of categories, the slowest kernels."""
    rates, total = found["rates"], found["total"]
    collectives = ", ".join(f"{count} {name}" for name, count in found["collectives"].items())
    lines = _compiled_lines(found) if "parameters" in found else []
    lines += [
        "attention by cuDNN: {forward} calls forward, {backward} backward".format(**found["attention"]),
        f"between devices: {collectives or 'nothing'}",
        f"kernels: {total['kernels']:,} in the program, launched {total['launches']:,} times",
    ]
    if found["unknown_loops"]:
        lines.append(f"loops whose turns are not known and count as one: {found['unknown_loops']}")
    lines += [
        "",
        f"at {rates['products'] / 1e12:,.0f} TFLOP/s (bfloat16; float32 half of it) and "
        f"{rates['bandwidth'] / 1e12:.2f} TB/s:",
        "",
    ]
    rows = [("", "ms", "share", "launches", "TFLOPs", "GB read", "GB written")]
    for name, sums in [*found["categories"].items(), ("sum", total)]:
        rows.append((name, *_row(sums, sums["seconds"] / (total["seconds"] or 1))))
    lines += [*_table(rows), "", NOTE]
    if top:
        rows = [("kernel", "ms", "times", "GFLOPs", "MB read", "MB written", "category", "result", "from")]
        lines += ["", *_table([*rows, *map(_kernel_row, alike(found["kernels"])[:top])], left=(0, 6, 7, 8))]
    return "\n".join(line.rstrip() for line in lines)


def alike(kernels: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The kernels, with those that differ in nothing but the number of their layer as one; the slowest first."""
    groups: dict[tuple[Any, ...], dict[str, Any]] = {}
    for kernel in kernels:
        place = re.sub(r"\d+", "", kernel["op_name"])
        same = [kernel[field] for field in ("category", "result", "flops", "read", "written")]
        first = groups.setdefault((place, *same), {**kernel, "times": 0, "seconds": 0.0})
        first["times"] += kernel["times"]
        first["seconds"] += kernel["seconds"]
    return sorted(groups.values(), key=lambda kernel: -kernel["seconds"])


def _compiled_lines(found: Mapping[str, Any]) -> list[str]:
    memory = ", ".join(f"{name} {size / 2**30:.2f}" for name, size in found["memory"].items())
    took = ", ".join(f"{name} {seconds:.1f}" for name, seconds in found["seconds"].items())
    return [
        f"{found['case']}, {found['step']}, {found['dtype']}, batch {found['batch']}, on {found['devices']} x "
        f"{found['device_kind']}",
        f"parameters: {found['parameters']:,}; FLOPs of the traced step, on all devices: {found['flops']:.4g}",
        f"seconds: {took}",
        f"memory of a device, GiB: {memory}",
    ]


def _row(sums: Mapping[str, float], share: float) -> tuple[str, ...]:
    return (
        f"{1e3 * sums['seconds']:.2f}",
        f"{share:.1%}",
        f"{sums['launches']:,}",
        f"{sums['flops'] / 1e12:.2f}",
        f"{sums['read'] / 1e9:.2f}",
        f"{sums['written'] / 1e9:.2f}",
    )


def _kernel_row(kernel: Mapping[str, Any]) -> tuple[str, ...]:
    """A kernel's cells: bytes and FLOPs of one run, the time of all."""
    return (
        kernel["name"][:44],
        f"{1e3 * kernel['seconds']:.3f}",
        f"{kernel['times']:,}",
        f"{kernel['flops'] / 1e9:.1f}",
        f"{kernel['read'] / 1e6:.1f}",
        f"{kernel['written'] / 1e6:.1f}",
        kernel["category"],
        kernel["result"][:48],
        kernel["op_name"][-72:],
    )


def _table(rows: Sequence[Sequence[str]], left: Sequence[int] = (0,)) -> list[str]:
    """Columns of even width; those of `left` begin at the left."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]

    def line(row: Sequence[str]) -> str:
        cells = zip(row, widths, strict=True)
        return "  ".join(cell.ljust(w) if i in left else cell.rjust(w) for i, (cell, w) in enumerate(cells))

    return [line(row) for row in rows]


def chosen_rates(device_kind: str, products: float | None = None, bandwidth: float | None = None) -> Rates:
    """The device's; what is given, in TFLOP/s and TB/s, stands in their place.

    Raises:
        ValueError: if nothing is known of the device and one of them is not given.
    """
    known = RATES.get(device_kind)
    if known is None and None in (products, bandwidth):
        raise ValueError(f"what {device_kind} reaches is not known: give --rate and --bandwidth")
    return Rates(
        known.products if products is None else 1e12 * products,
        known.bandwidth if bandwidth is None else 1e12 * bandwidth,
    )


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = argparse.ArgumentParser(prog="python -m benchmarks.roofline", description=__doc__.splitlines()[0])
    networks = [name for name, case in CASES.items() if case["kind"] != "generate"]
    result.add_argument("case", nargs="?", choices=networks, metavar="CASE", help=", ".join(networks))
    result.add_argument("--topology", default="h200:1", metavar="NAME:DEVICES", help="default: %(default)s")
    result.add_argument("--mesh", default="", metavar="AXIS=SIZE,...", help="default: all devices fsdp")
    result.add_argument("--step", default="train_step", choices=MEASURES, help="default: %(default)s")
    result.add_argument("--dtype", default="bfloat16", choices=("float32", "bfloat16"), help="default: %(default)s")
    result.add_argument("--set", default="", metavar="FIELD=VALUE,...", help="fields of the case, as batch=16")
    result.add_argument("--top", type=int, default=20, metavar="N", help="kernels to list (default: %(default)s)")
    result.add_argument("--hlo", type=Path, metavar="FILE", help="write the optimized program's text there")
    result.add_argument("--from", type=Path, dest="saved", metavar="FILE", help="examine such a text, compile nothing")
    result.add_argument("--out", type=Path, metavar="FILE", help="write all of it there as JSON")
    result.add_argument("--rate", type=float, metavar="TFLOP/S", help="of products in bfloat16, other than known")
    result.add_argument("--bandwidth", type=float, metavar="TB/S", help="of the memory, other than known")
    return result


def main(arguments: Sequence[str] | None = None) -> None:
    """Compiles or reads a program and prints its roofline."""
    command = parser()
    orders = command.parse_args(arguments)
    if (orders.case is None) == (orders.saved is None):
        command.error("name a case to compile, or a saved program with --from FILE")
    try:
        if orders.saved is not None:
            found, text = {}, orders.saved.read_text()
            rates = chosen_rates(DEFAULT_DEVICE, orders.rate, orders.bandwidth)
        else:
            case = changed_case(orders.case, orders.set)
            mesh = topology_mesh(orders.topology, mesh_sizes(orders.mesh) if orders.mesh else None)
            rates = chosen_rates(mesh.devices.flat[0].device_kind, orders.rate, orders.bandwidth)
            names = {"case": orders.case, "step": orders.step, "dtype": orders.dtype, "batch": case["batch"]}
            compiled, text = compile_case(case, orders.step, orders.dtype, mesh)
            found = names | compiled
        if orders.hlo is not None:
            orders.hlo.write_text(text)
        found |= analyse(text, rates)
        if orders.out is not None:
            orders.out.write_text(json.dumps(found, indent=1) + "\n")
    except (ValueError, OSError) as error:
        command.error(str(error))
    except jax.errors.JaxRuntimeError as error:
        reason = str(error).strip().splitlines()[0]
        hint = "; try XLA_FLAGS=--xla_gpu_enable_triton_gemm=false" * ("tile sizes" in reason)
        command.exit(1, f"XLA cannot compile it{hint}: {reason}\n")
    print(page(found, orders.top))


if __name__ == "__main__":
    main()
