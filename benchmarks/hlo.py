"""The kernels of a program that XLA has optimized for a GPU: how often each runs, its FLOPs and the bytes it moves.

Text in, kernels out; only the standard library is needed. The text is what `Compiled.as_text()` gives.

How things are counted:

FLOPs   products, convolutions and cuDNN's attention; a multiply-add is two. Attention is two products forward and five
        backward, one of which is the forward's first computed again (layers/flops.py leaves that one out). What a
        causal mask hides counts.
bytes   each kernel reads its operands once and writes its results once. Of an operand that it only slices, the slices
        count; a dynamic-update-slice into an operand is done in place and writes the update alone. What a kernel finds
        in the cache counts too, and workspaces do not.
times   a loop's body counts as often as it runs where the compiler knows the number of its turns, otherwise once. Of a
        conditional the costliest branch counts.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

PRODUCT, CONVOLUTION, ATTENTION = "product", "convolution", "attention"
STACK, COLLECTIVE, OTHER = "stack copy", "collective", "other"

COLLECTIVES = set(
    "all-gather all-reduce reduce-scatter all-to-all ragged-all-to-all collective-permute collective-broadcast".split()
)
# Launch nothing: names for values, and the numbers of the device.
FREE = set(
    "add-dependency after-all bitcast constant get-tuple-element opt-barrier parameter partition-id replica-id "
    "tuple".split()
)
# Which operand is written into the first one, which stays where it is.
UPDATES = {"dynamic-update-slice": 1, "scatter": 2}
SLICES = {"dynamic-slice", "slice", "gather"}
# These need all of their operands, however little of their result is asked for.
WHOLE = {"call", "convolution", "custom-call", "dot", "fusion", "scatter", "sort", "while"}

BITS = {"pred": 8, "bf16": 16, "c64": 64, "c128": 128, "token": 0, "opaque": 0}
ARRAY = re.compile(r"\b(pred|bf16|token|opaque|[sufc]\d+|f\d+e\w+)\[([\d,]*)\]")
COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
INSTRUCTION = re.compile(r"^\s+(ROOT )?%([\w.\-]+) = (.*)$")
BRACKET = re.compile(r"[()]")
REFERENCE = re.compile(r"%([\w.\-]+)")
TRIPS = re.compile(r'"known_trip_count":\s*\{\s*"n":\s*"(\d+)"')


@dataclass(frozen=True)
class Array:
    dtype: str
    dims: tuple[int, ...]

    @property
    def size(self) -> int:
        return math.prod(self.dims)

    @property
    def bits(self) -> int:
        """Of one element."""
        return BITS[self.dtype] if self.dtype in BITS else int(re.match(r"[a-z](\d+)", self.dtype)[1])

    @property
    def bytes(self) -> int:
        return self.size * self.bits // 8


@dataclass(frozen=True)
class Instruction:
    """One line of a computation: `%name = result opcode(operands), attributes`."""

    name: str
    result: str
    opcode: str
    operands: tuple[str, ...]
    attributes: str
    is_root: bool

    @cached_property
    def arrays(self) -> tuple[Array, ...]:
        """The result's arrays, those of a tuple in order; the workspaces of cuBLAS and cuDNN are left out."""
        found = tuple(Array(dtype, _numbers(dims)) for dtype, dims in ARRAY.findall(self.result))
        if self.target.startswith(("__cublas", "__cudnn")):
            kept = tuple(a for a in found if not (a.dtype in ("s8", "u8") and len(a.dims) == 1))
            return kept or found
        return found

    @property
    def size(self) -> int:
        return sum(array.size for array in self.arrays)

    @property
    def bytes(self) -> int:
        return sum(array.bytes for array in self.arrays)

    @cached_property
    def target(self) -> str:
        """The library's function that a custom call is for; "" of other instructions."""
        found = re.search(r'custom_call_target="([^"]+)"', self.attributes) if "custom-call" in self.opcode else None
        return found[1] if found else ""

    @property
    def op_name(self) -> str:
        """Where it comes from in the traced program, as jax names it."""
        found = re.search(r'op_name="([^"]*)"', self.attributes)
        return found[1] if found else ""

    def called(self, *attributes: str) -> str | None:
        """The computation that the first of these attributes that is there names."""
        for attribute in attributes:
            found = re.search(rf"\b{attribute}=%?([\w.\-]+)", self.attributes)
            if found:
                return found[1]
        return None

    def dimensions(self, *attributes: str) -> tuple[int, ...]:
        """Numbers of an attribute, written `lhs={0,1}` or, by a library's configuration, `"lhs":["0","1"]`."""
        for attribute in attributes:
            found = re.search(rf'\b{attribute}(?:=\{{|":\s*\[)([\d,"\s]*)', self.attributes)
            if found:
                return _numbers(re.sub(r'["\s]', "", found[1]))
        return ()


Computation = Mapping[str, Instruction]


@dataclass(frozen=True)
class Module:
    """The computations by name, each its instructions by name, in order; `entry` is where the program starts."""

    computations: Mapping[str, Computation]
    entry: str


@dataclass(frozen=True)
class Kernel:
    """What is launched by one instruction.

    kind: one of the kinds above. opcode: the instruction's, or the library's function. dtype: what a product or
    convolution multiplies, as bf16; float32 also where only one side is. times: how often it runs. flops, read,
    written: of one run. result: the type of what it gives. op_name: see `Instruction`.
    """

    name: str
    kind: str
    opcode: str
    dtype: str
    times: int
    flops: int
    read: int
    written: int
    result: str
    op_name: str


def kernels(text: str) -> list[Kernel]:
    """All kernels of a program, in its order.

    Raises:
        ValueError: if the text is not that of a program.
    """
    module = parse(text)
    return list(_walk(module, module.entry, 1))


def unknown_loops(text: str) -> int:
    """How many loops there are of which the compiler does not know how often they run."""
    return sum(" while(" in line and not TRIPS.search(line) for line in text.splitlines())


def parse(text: str) -> Module:
    """The program's computations.

    Raises:
        ValueError: if the text is not that of a program.
    """
    computations: dict[str, dict[str, Instruction]] = {}
    entry, current = None, None
    for line in text.splitlines():
        if not line.startswith(" "):
            head = COMPUTATION.match(line)
            current = computations.setdefault(head[2], {}) if head else None
            entry = head[2] if head and head[1] else entry
        elif current is not None and (found := INSTRUCTION.match(line)):
            current[found[2]] = _instruction(found[2], found[3], bool(found[1]))
    if entry is None:
        raise ValueError("this is no HLO text of a compiled program: it has no line that starts with ENTRY")
    return Module(computations, entry)


def _instruction(name: str, rest: str, is_root: bool) -> Instruction:
    end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.index(" ")
    begin = rest.index("(", end)
    close = _closing(rest, begin)
    operands = tuple(REFERENCE.findall(rest, begin, close))
    return Instruction(name, rest[:end], rest[end:begin].strip(), operands, rest[close + 1 :], is_root)


def _closing(text: str, begin: int) -> int:
    """Where the bracket that opens at `begin` is closed."""
    depth = 0
    for found in BRACKET.finditer(text, begin):
        depth += 1 if found[0] == "(" else -1
        if depth == 0:
            return found.start()
    raise ValueError(f"a bracket is never closed in: {text[:80]}")


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(",") if part)


def _walk(module: Module, name: str, times: int) -> Iterator[Kernel]:
    """The kernels of a computation that runs so many times, and of those that it calls."""
    table = module.computations[name]
    for instruction in table.values():
        opcode = instruction.opcode
        if opcode in FREE or opcode.endswith(("-done", "-update")):
            continue
        if opcode == "while":
            trips = TRIPS.search(instruction.attributes)
            yield from _walk(module, instruction.called("body"), times * int(trips[1] if trips else 1))
        elif opcode in ("call", "call-start", "async-start"):
            yield from _walk(module, instruction.called("to_apply", "calls"), times)
        elif opcode == "conditional":
            branches = [list(_walk(module, branch, times)) for branch in _branches(instruction)]
            yield from max(branches, key=_work)
        else:
            yield _kernel(module, instruction, table, times)


def _branches(conditional: Instruction) -> list[str]:
    """The computations of which one runs."""
    found = re.search(r"branch_computations=\{([^}]*)\}", conditional.attributes)
    if found:
        return REFERENCE.findall(found[1])
    return [conditional.called("true_computation"), conditional.called("false_computation")]


def _work(kernels: list[Kernel]) -> tuple[int, int]:
    """By which the costliest branch is chosen: FLOPs, then bytes."""
    return sum(k.times * k.flops for k in kernels), sum(k.times * (k.read + k.written) for k in kernels)


def _kernel(module: Module, instruction: Instruction, table: Computation, times: int) -> Kernel:
    opcode = instruction.opcode.removesuffix("-start")
    work = list(_multiplications(module, instruction, table))
    if opcode == "fusion":
        inner = module.computations[instruction.called("calls")]
        read, written, copies = _fusion_traffic(inner)
    else:
        read, written, copies = _traffic(instruction, table)
    kind, dtype = OTHER, ""
    if work:
        kind, dtype, _ = max(work, key=lambda part: part[2])
    elif opcode in COLLECTIVES:
        kind = COLLECTIVE
    elif copies:
        kind = STACK
    return Kernel(
        name=instruction.name,
        kind=kind,
        opcode=instruction.target or opcode,
        dtype=dtype,
        times=times,
        flops=sum(flops for _, _, flops in work),
        read=read,
        written=written,
        result=instruction.result,
        op_name=instruction.op_name,
    )


def _multiplications(module: Module, instruction: Instruction, table: Computation) -> Iterator[tuple[str, str, int]]:
    """(kind, dtype, FLOPs) of every product, convolution and attention in an instruction and in what it calls."""
    opcode, target = instruction.opcode.removesuffix("-start"), instruction.target
    if opcode in ("fusion", "call"):
        name = instruction.called("calls", "to_apply")
        inner = module.computations.get(name, {})
        for part in inner.values():
            yield from _multiplications(module, part, inner)
        return
    if opcode not in ("dot", "convolution", "custom-call"):
        return
    operands = [table[name].arrays[0] for name in instruction.operands[:2] if name in table and table[name].arrays]
    if len(operands) < 2:
        return
    left, right = operands
    dtypes = {left.dtype, right.dtype}
    dtype = "float32" if "f32" in dtypes else "/".join(sorted(dtypes))
    result = instruction.arrays[0]
    if opcode == "dot" or target.startswith("__cublas"):
        contracted = instruction.dimensions("lhs_contracting_dims", "lhs_contracting_dimensions")
        yield PRODUCT, dtype, 2 * result.size * math.prod(left.dims[axis] for axis in contracted)
    elif opcode == "convolution" or target.startswith("__cudnn$conv"):
        yield CONVOLUTION, dtype, _convolution_flops(instruction, left, right, result)
    elif target.startswith("__cudnn$fmha"):
        (batch, queries, heads, size), keys = left.dims, right.dims[1]
        products = 5 if "Backward" in target else 2
        yield ATTENTION, dtype, 2 * products * batch * heads * queries * keys * size


def _convolution_flops(instruction: Instruction, left: Array, right: Array, result: Array) -> int:
    """2 x the places of the forward convolution's output x the kernel, whichever of the three is computed."""
    labels = re.search(r"dim_labels=\w+_(\w+)->", instruction.attributes)[1]
    kernel, output = right, result
    if "BackwardFilter" in instruction.target:  # of the input and the output's gradient
        kernel, output = result, right
    elif "BackwardInput" in instruction.target:  # of the output's gradient and the kernel
        output = left
    return 2 * output.size * kernel.size // kernel.dims[labels.index("o")]


def _traffic(instruction: Instruction, table: Computation) -> tuple[int, int, bool]:
    """(bytes read, bytes written, whether it copies into or out of a stack) of an instruction that is a kernel."""
    in_place = instruction.opcode in UPDATES
    read = 0.0
    for index, name in enumerate(instruction.operands):
        if name in table:
            operand = table[name]
            wanted = _wanted(instruction, index, operand.size, instruction.size, in_place)
            read += operand.bytes * wanted / max(1, operand.size)
    result = instruction
    if instruction.opcode.endswith("-start"):  # what it gives holds the operands too
        ends = (i for i in table.values() if i.opcode.endswith("-done") and instruction.name in i.operands)
        result = next(ends, instruction)
    written = table[instruction.operands[UPDATES[instruction.opcode]]].bytes if in_place else result.bytes
    return round(read), written, instruction.opcode in ("dynamic-slice", "dynamic-update-slice")


def _fusion_traffic(inner: Computation) -> tuple[int, int, bool]:
    """As `_traffic`, of a fusion: from its results back to its parameters, by how much of each value is asked for.

    It copies if at least half of what it writes updates an array in place, or if it does nothing but slice.
    """
    root = next(i for i in inner.values() if i.is_root)
    names = root.operands if root.opcode == "tuple" else (root.name,)
    results = [_behind_bitcasts(inner[name], inner) for name in names]
    in_place = {result.name for result in results if _is_in_place(result, inner)}
    written, updated, slices = 0, 0, True
    wanted = dict.fromkeys(inner, 0.0)
    for result in results:
        wanted[result.name] = result.size
        if result.name in in_place:
            update = inner[result.operands[UPDATES[result.opcode]]].bytes
            written, updated = written + update, updated + update * (result.opcode == "dynamic-update-slice")
        else:
            written += result.bytes
            slices &= _behind_bitcasts(result, inner, {"copy"}).opcode == "dynamic-slice"
    for instruction in reversed(inner.values()):
        asked = wanted[instruction.name]
        for index, name in enumerate(instruction.operands):
            if asked and name in inner:
                size = inner[name].size
                more = _wanted(instruction, index, size, asked, instruction.name in in_place)
                wanted[name] = min(size, wanted[name] + more)
    parameters = [i for i in inner.values() if i.opcode == "parameter"]
    read = sum(i.bytes * wanted[i.name] / max(1, i.size) for i in parameters)
    copies = 2 * updated >= written if updated else slices and not in_place
    return round(read), written, copies


def _wanted(user: Instruction, index: int, size: int, asked: float, in_place: bool) -> float:
    """How many of an operand's `size` elements `user` reads when so many of its own are asked for."""
    if in_place:
        return 0 if index == 0 else size
    if user.opcode.removesuffix("-start") in WHOLE:
        return size
    if user.opcode in SLICES or user.opcode == "broadcast":
        return min(size, asked) if index == 0 else size
    return size * min(1, asked / max(1, user.size))


def _behind_bitcasts(instruction: Instruction, table: Computation, also: set[str] = frozenset()) -> Instruction:
    """What a value is another name for."""
    while instruction.opcode == "bitcast" or instruction.opcode in also:
        instruction = table[instruction.operands[0]]
    return instruction


def _is_in_place(instruction: Instruction, table: Computation) -> bool:
    """Whether it writes into an array that the kernel is given."""
    if instruction.opcode not in UPDATES:
        return False
    return _behind_bitcasts(table[instruction.operands[0]], table).opcode == "parameter"
