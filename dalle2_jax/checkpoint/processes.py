"""What the processes of one run say to each other, so that they decide alike; with a single process, nothing happens.

All of them must call these functions, in the same order and from their main threads.
"""

import itertools
import json
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

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
