"""What the processes of one run say to each other, so that they decide alike; with a single process, nothing happens.

All of them must call these functions, in the same order and from their main threads.
"""

import itertools
import json
import socket
from collections.abc import Callable
from hashlib import blake2b
from typing import Any, TypeVar

import jax
import numpy as np

from dalle2_jax.errors import InputError
from dalle2_jax.sharding import processes

# Texts are sent in pieces of this many bytes, so that few lengths are compiled for.
PIECE = 1024
# For downloads and drawing of data sets, which take as long as they take.
LONGEST_WAIT = 7 * 24 * 3600

_waits = itertools.count()


def gather(value: Any) -> list[Any]:
    """Every process's value (JSON) on every process, in the order of the processes."""
    if jax.process_count() == 1:
        return [value]
    from jax.experimental import multihost_utils

    wait_for_all()
    text = np.frombuffer(json.dumps(value).encode(), np.uint8)
    lengths = multihost_utils.process_allgather(np.array(len(text)))
    room = -(-int(lengths.max()) // PIECE) * PIECE
    rows = multihost_utils.process_allgather(np.pad(text, (0, room - len(text))))
    return [json.loads(row[:length].tobytes()) for row, length in zip(rows, lengths, strict=True)]


def of_first(find: Callable[[], Any]) -> Any:
    """What `find` gives to the first process (JSON), on every process; the others do not call it."""
    return gather(find() if jax.process_index() == 0 else None)[0]


def wait_for_all() -> None:
    """Returns when every process has come here, however long that takes.

    It asks nothing of the devices, whose own ways to wait give up after a while.
    """
    if jax.process_count() == 1:
        return
    from orbax.checkpoint import multihost

    wait = multihost.get_barrier_sync_fn()
    wait(key=f"dalle2_jax {next(_waits)}", timeout_ms=1000 * LONGEST_WAIT)


Found = TypeVar("Found")


def only_first(log: Callable[[str], None]) -> Callable[[str], None]:
    """`log` in the first process, and nothing in the others."""
    return log if jax.process_index() == 0 else lambda _: None


def first_then_others(make: Callable[[], Found]) -> Found:
    """`make()`, in the first process before the others: what it prepares on a shared disk is there for them."""
    if jax.process_count() == 1:
        return make()
    made = make() if jax.process_index() == 0 else None
    processes.wait_for_all()
    return made if jax.process_index() == 0 else make()


def check_same(what: str, value: Any) -> None:
    """Raises InputError, in every process, unless they all have the same value (a number or text)."""
    if jax.process_count() == 1:
        return
    said = processes.gather([socket.gethostname(), blake2b(str(value).encode(), digest_size=16).hexdigest()])
    others = [host for host, digest in said if digest != said[0][1]]
    if others:
        raise InputError(
            f"{what} is not the same on {others[0]} as on {said[0][0]}: every host must read the same data and files; "
            "bring them there, or use a disk that all share"
        )
