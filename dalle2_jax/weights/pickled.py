"""Whole PyTorch modules that `torch.save(module)` pickled: their tensors, without torch and without running anything.

A pickle is a program for a machine with a stack, and what Python's own `pickle` does at its word can be anything. Here
the program is read by a machine that only knows what such a file needs. The names in it stand for themselves: a module
is an object that keeps its state, a storage is a place in the file, and no name is looked up or called.

The two containers of torch are read: the zip archive (since 1.6) and the one before it, pickles and then bytes.
"""

from __future__ import annotations

import io
import math
import pickletools
import struct
import zipfile
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from dalle2_jax.weights.tensors import Tensors, WeightsError

LARGEST_PICKLE = 16 * 2**20  # bytes, without the tensors'; a module of a hundred layers takes 50,000
MOST_AXES = 8
LEGACY_MAGIC, LEGACY_VERSION = 0x1950A86A20F9469CFC6C, 1001
STORAGES = {"torch.FloatStorage": "float32", "torch.HalfStorage": "float16", "torch.DoubleStorage": "float64"}
CALLED = (
    "__builtin__.set",
    "builtins.set",
    "collections.OrderedDict",
    "torch.device",
    "torch._utils._rebuild_parameter",
    "torch._utils._rebuild_tensor_v2",
)


class _Damaged(ValueError):
    """What is wrong with a file, for the sentence that names it."""


# What comes of reading files that are not as they should be.
_DAMAGE = (
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    EOFError,
    RuntimeError,
    struct.error,
    zipfile.BadZipFile,
)


@dataclass(frozen=True)
class Global:
    """A name that a pickle refers to."""

    name: str


@dataclass(eq=False)
class Object:
    """In the place of a module: the state it was saved with."""

    state: Any = None


@dataclass(frozen=True)
class Storage:
    """`count` numbers of a dtype, which the container keeps under `key`."""

    key: str
    dtype: str
    count: int

    @property
    def size(self) -> int:
        """In bytes."""
        return self.count * np.dtype(self.dtype).itemsize


@dataclass(frozen=True)
class Tensor:
    """A part of a storage, one row after the other."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]


@dataclass(frozen=True)
class _Container:
    """root: what was saved. storages: by their keys. read: the bytes of one."""

    root: Any
    storages: dict[str, Storage]
    read: Callable[[Storage], bytes]


def open_module(path: str | Path, modules: Collection[str]) -> Tensors:
    """The parameters and buffers of a pickled module by their names in its state dict; each is read when asked for.

    modules: the classes of which it may consist, such as "torch.nn.modules.activation.ReLU".

    Raises:
        WeightsError: if there is no such file, it is damaged or cut short, or it refers to anything but these classes
            and what a tensor is made of, naming it.
    """
    path = Path(path)
    if not path.is_file():
        raise WeightsError(f"there is no file {path}")
    try:
        with path.open("rb") as file:
            zipped = file.read(4) == b"PK\x03\x04"
        container = (_open_zip if zipped else _open_legacy)(path, modules)
        tensors = _tensors_of(container.root, str(path))
    except WeightsError:
        raise
    except _DAMAGE as error:
        raise WeightsError(
            f"{path} is damaged, or no module that PyTorch saved ({type(error).__name__}: {error}); download it again"
        ) from error

    def read(name: str) -> np.ndarray:
        tensor = tensors[name]
        try:
            data = container.read(tensor.storage)
        except _DAMAGE as error:
            raise WeightsError(f"the tensor {name} of {path} is damaged ({error}); download it again") from error
        numbers = np.frombuffer(data, np.dtype(tensor.storage.dtype).newbyteorder("<"))
        part = numbers[tensor.offset : tensor.offset + math.prod(tensor.shape)]
        return part.astype(tensor.storage.dtype).reshape(tensor.shape)

    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    return Tensors(str(path), shapes, {name: tensor.storage.dtype for name, tensor in tensors.items()}, read)


def _open_zip(path: Path, modules: Collection[str]) -> _Container:
    with zipfile.ZipFile(path) as archive:
        members = {info.filename: info for info in archive.infolist()}
        if any(info.compress_type != zipfile.ZIP_STORED for info in members.values()):
            raise _Damaged("its members are compressed")
        (pickled,) = [name for name in members if name.rpartition("/")[2] == "data.pkl"]
        folder = pickled.removesuffix("data.pkl")
        if members[pickled].file_size > LARGEST_PICKLE:
            raise _Damaged(f"its pickle is larger than {LARGEST_PICKLE} bytes")
        order = f"{folder}byteorder"
        if order in members and archive.open(order).read(16).strip() != b"little":
            raise _Damaged("its numbers are not little-endian")
        reader = _Reader(str(path), modules)
        root = reader.read(io.BytesIO(archive.read(pickled)))
    for storage in reader.storages.values():
        if members[f"{folder}data/{storage.key}"].file_size != storage.size:
            raise _Damaged(f"its storage {storage.key!r} is not of {storage.size} bytes")

    def read(storage: Storage) -> bytes:
        with zipfile.ZipFile(path) as archive:
            return archive.read(f"{folder}data/{storage.key}")

    return _Container(root, reader.storages, read)


def _open_legacy(path: Path, modules: Collection[str]) -> _Container:
    reader, total = _Reader(str(path), modules), path.stat().st_size
    with path.open("rb") as file:
        head = io.BytesIO(file.read(LARGEST_PICKLE))
        if reader.read(head) != LEGACY_MAGIC or reader.read(head) != LEGACY_VERSION:
            raise _Damaged("it does not begin as PyTorch's files do")
        if reader.read(head)["little_endian"] is not True:
            raise _Damaged("its numbers are not little-endian")
        root, keys = reader.read(head), reader.read(head)
        if sorted(_of(str, key) for key in _of(list, keys)) != sorted(reader.storages):
            raise _Damaged("its list of storages is not that of its tensors")
        # Each as its count of numbers, in eight bytes, and the numbers.
        places, position = {}, head.tell()
        for key in keys:
            file.seek(position)
            (count,) = struct.unpack("<q", file.read(8))
            places[key], position = position + 8, position + 8 + reader.storages[key].size
            if count != reader.storages[key].count or position > total:
                raise _Damaged(f"its storage {key!r} is not of {reader.storages[key].size} bytes")

    def read(storage: Storage) -> bytes:
        with path.open("rb") as file:
            file.seek(places[storage.key])
            data = file.read(storage.size)
        if len(data) != storage.size:
            raise EOFError("the file ends in it")
        return data

    return _Container(root, reader.storages, read)


def _tensors_of(root: Any, where: str) -> dict[str, Tensor]:
    """Of a module and the modules in it, by their paths."""
    found: dict[str, Tensor] = {}
    pending, seen = [("", root)], set()
    while pending:
        prefix, module = pending.pop()
        if not isinstance(module, Object) or not isinstance(module.state, dict):
            raise WeightsError(f"{where} holds something other than a module; give a file of a whole one")
        own, buffers, children = (module.state[name] for name in ("_parameters", "_buffers", "_modules"))
        parts = {id(part) for part in (module, own, buffers, children)}
        if seen & parts:  # a few bytes could then stand for modules without end
            raise _Damaged(f"the module {prefix!r} is in it twice")
        seen |= parts
        for name, value in (*own.items(), *buffers.items()):
            if isinstance(value, Tensor):
                found[f"{prefix}{name}"] = value
            elif value is not None:
                raise _Damaged(f"{prefix + str(name)!r} is no tensor")
        pending += [(f"{prefix}{name}.", child) for name, child in children.items()]
    return found


class _Reader:
    """The machine that reads pickles of protocol 2, the one that torch writes."""

    def __init__(self, where: str, modules: Collection[str]):
        self.where, self.modules = where, frozenset(modules)
        self.storages: dict[str, Storage] = {}

    def read(self, file: BinaryIO) -> Any:
        """What the next pickle of the file says; of its objects `Object`, of its tensors `Tensor`."""
        stack: list[Any] = []
        marked: list[list[Any]] = []
        memo: dict[int, Any] = {}

        def since_mark() -> list[Any]:
            nonlocal stack
            items, stack = stack, marked.pop()
            return items

        for instruction, argument, _ in pickletools.genops(file):
            match instruction.name:
                case "PROTO":
                    pass
                case "STOP":
                    (result,) = stack
                    return result
                case "MARK":
                    marked.append(stack)
                    stack = []
                case "NONE" | "NEWTRUE" | "NEWFALSE":
                    stack.append({"NONE": None, "NEWTRUE": True, "NEWFALSE": False}[instruction.name])
                case "BININT" | "BININT1" | "BININT2" | "LONG1" | "BINFLOAT" | "BINUNICODE":
                    stack.append(argument)
                case "EMPTY_TUPLE":
                    stack.append(())
                case "EMPTY_LIST":
                    stack.append([])
                case "EMPTY_DICT":
                    stack.append({})
                case "TUPLE1" | "TUPLE2" | "TUPLE3":
                    count = int(instruction.name[-1])
                    stack[-count:] = [tuple(stack[-count:])]
                case "TUPLE":
                    items = since_mark()
                    stack.append(tuple(items))
                case "APPEND" | "APPENDS":
                    items = [stack.pop()] if instruction.name == "APPEND" else since_mark()
                    _of(list, stack[-1]).extend(items)
                case "SETITEM" | "SETITEMS":
                    items = [stack.pop(-2), stack.pop()] if instruction.name == "SETITEM" else since_mark()
                    names = [_of(str | int, name) for name in items[::2]]
                    _of(dict, stack[-1]).update(zip(names, items[1::2], strict=True))
                case "BINPUT" | "LONG_BINPUT":
                    memo[argument] = stack[-1]
                case "BINGET" | "LONG_BINGET":
                    stack.append(memo[argument])
                case "GLOBAL":
                    stack.append(self._known(argument.replace(" ", ".", 1)))
                case "BINPERSID":
                    stack.append(self._persistent(*_of(tuple, stack.pop())))
                case "REDUCE":
                    arguments, called = _of(tuple, stack.pop()), _of(Global, stack.pop())
                    stack.append(self._call(called.name, arguments))
                case "NEWOBJ":
                    arguments, kind = stack.pop(), _of(Global, stack.pop()).name
                    if kind not in self.modules or arguments != ():
                        raise _Damaged(f"it makes a {kind}")
                    stack.append(Object())
                case "BUILD":
                    state = stack.pop()
                    _of(Object, stack[-1]).state = state
                case other:
                    raise _Damaged(f"its pickle has the instruction {other}, which a module does not need")
        raise EOFError("its pickle ends too early")

    def _known(self, name: str) -> Global:
        if name not in CALLED and name not in STORAGES and name not in self.modules:
            raise WeightsError(
                f"{self.where} refers to {name!r}, which is no part of such a module and could run code, and is not "
                "opened; download it anew from where it was published"
            )
        return Global(name)

    def _persistent(self, tag: str, kind: Global, key: str, *rest: Any) -> Any:
        """What lies outside of the pickle: a storage, or in the older container a module's class with its source."""
        if tag == "module":
            return _of(Global, kind)
        location, count, *view = rest
        if tag != "storage" or any(part is not None for part in view):
            raise _Damaged(f"it refers to {tag!r} outside of its pickle")
        dtype = STORAGES[_of(Global, kind).name]
        storage = Storage(_of(str, key), dtype, _count(count))
        if self.storages.setdefault(storage.key, storage) != storage:
            raise _Damaged(f"its storage {key!r} is of two kinds")
        return storage

    def _call(self, name: str, arguments: tuple[Any, ...]) -> Any:
        match name.rpartition(".")[2], arguments:
            case "OrderedDict", ():
                return {}
            case "set", (list() as items,):
                return tuple(items)
            case "device", _:
                return None
            case "_rebuild_parameter", (Tensor() as tensor, bool(), _):
                return tensor
            case "_rebuild_tensor_v2", (Storage() as storage, offset, tuple() as shape, tuple() as strides, *_):
                return _tensor(storage, offset, shape, strides)
        raise _Damaged(f"it calls {name} with what it does not take")


def _tensor(storage: Storage, offset: Any, shape: tuple[Any, ...], strides: tuple[Any, ...]) -> Tensor:
    if len(shape) > MOST_AXES:
        raise _Damaged(f"it has a tensor of {len(shape)} axes")
    shape = tuple(map(_count, shape))
    due = [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]
    if any(size > 1 and stride != one for size, stride, one in zip(shape, strides, due, strict=True)):
        raise _Damaged(f"a tensor of shape {list(shape)} lies in its storage with the strides {list(strides)}")
    if _count(offset) + math.prod(shape) > storage.count:
        raise _Damaged(f"a tensor of shape {list(shape)} is larger than its storage {storage.key!r}")
    return Tensor(storage, offset, shape)


def _of(kind: Any, value: Any) -> Any:
    if not isinstance(value, kind):
        raise TypeError(f"it has a {type(value).__name__} in a place where there can be none")
    return value


def _count(value: Any) -> int:
    if type(value) is not int or not 0 <= value < 2**48:
        raise _Damaged("it has a size that is no size")
    return value
