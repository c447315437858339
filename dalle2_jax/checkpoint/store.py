"""A stage's checkpoints: written by orbax in the background, checked when they are read.

A training state is a plain dict. Each of its entries that is a tree (`params`, `ema`, `optimizer`) becomes a part of
its own on disk, so that a later stage reads the EMA alone; its bare arrays (`step`, `key`, ...) go together into
`progress`.
"""

import json
import logging
import os
import re
import shutil
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from dalle2_jax.checkpoint.errors import CheckpointError
from dalle2_jax.checkpoint.files import CHECKSUMS, read_json, verify, write_checksums
from dalle2_jax.errors import InputError
from dalle2_jax.files import numbered, write_atomically
from dalle2_jax.sharding import processes

logger = logging.getLogger(__name__)

CHECKPOINTS = "checkpoints"
EXTRAS = "extras.json"
PROGRESS = "progress"

STEP = re.compile("[0-9]+")
# What is renamed, since a save or a whole checkpoint takes its place.
SET_ASIDE = re.compile(r"[0-9]+(-[0-9]+)?\.(damaged|before)")
# Without checksums: what a save that was interrupted leaves, of ours or of orbax's.
_UNFINISHED = re.compile(r"[0-9]+(\.orbax-checkpoint-tmp.*)?")


@dataclass(frozen=True)
class Restored:
    """What `restore_latest` found, with one sentence for each damaged checkpoint that it passed over."""

    step: int
    state: dict[str, Any]
    iterator: Any
    metadata: dict[str, Any]
    damaged: tuple[str, ...]


def checkpoint_steps(stage_dir: str | Path) -> list[int]:
    """The steps of the finished checkpoints in a stage's folder, oldest first; damage is not looked for."""
    directory = Path(stage_dir) / CHECKPOINTS
    if not directory.is_dir():
        return []
    return sorted(
        int(path.name) for path in directory.iterdir() if STEP.fullmatch(path.name) and (path / CHECKSUMS).is_file()
    )


def checkpoint_path(stage_dir: str | Path, step: int) -> Path:
    """The folder of the checkpoint of one step."""
    return Path(stage_dir) / CHECKPOINTS / str(step)


class CheckpointWriter:
    """Writes checkpoints in the background and keeps the last `keep`.

    It is a context manager, because a save that nobody waits for is lost when the program ends:

        with CheckpointWriter(stage_dir) as writer:
            writer.save(step, state, iterator=iterator.get_state(), metadata={"seconds": 12.0})

    `save` returns as soon as the arrays are copied from the devices, so the state may be donated to the next step at
    once.

    Checkpoints beyond `keep` and saves that were interrupted are removed, and nothing else. Where the stage's folder or
    its `checkpoints` is a symbolic link, it is followed, and nothing that was there before is removed.
    """

    def __init__(self, stage_dir: str | Path, keep: int = 2, write_bytes: int | None = None):
        """keep: the newest checkpoints that stay. write_bytes: how much is in memory a second time while it is
        written; None: all of it."""
        if keep < 1:
            raise InputError(f"at least one checkpoint has to be kept, not {keep}")
        # Here and not at the first save, which would hold up training for a second.
        from orbax.checkpoint import v1  # noqa: F401

        self.stage_dir, self.keep, self._write_bytes = Path(stage_dir).resolve(), keep, write_bytes
        self.directory = self.stage_dir / CHECKPOINTS
        self.directory.mkdir(parents=True, exist_ok=True)
        self._is_linked = Path(stage_dir).is_symlink() or self.directory.is_symlink()
        self._written: set[Path] = set()
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: Future | None = None
        if jax.process_index() == 0:
            self._remove_unfinished()

    def _remove_unfinished(self) -> None:
        for path in sorted(self.directory.iterdir()):
            is_ours = _UNFINISHED.fullmatch(path.name) and path.is_dir() and not path.is_symlink()
            if not is_ours or (path / CHECKSUMS).is_file():
                continue
            if self._is_linked:
                logger.warning("%s is a save that was interrupted, behind a symbolic link: it stays there", path)
            else:
                logger.warning("removing %s, a save that was interrupted", path)
                shutil.rmtree(path)

    def _make_room(self, path: Path) -> None:
        """For a checkpoint at `path`: what is there is removed, or renamed behind a symbolic link."""
        if path.is_symlink():
            raise CheckpointError(f"{path} is a symbolic link where a checkpoint is to be written; remove the link")
        if path.exists():
            if self._may_remove(path):
                _remove(path)
            else:
                path.rename(_free(path.with_name(f"{path.name}.before")))

    def _may_remove(self, path: Path) -> bool:
        return not path.is_symlink() and (path in self._written or not self._is_linked)

    def save(
        self, step: int, state: dict[str, Any], iterator: Any = None, metadata: dict[str, Any] | None = None
    ) -> None:
        """Starts to save; waits first for a save that is still under way, and raises what that one raised.

        Args:
            state: a dict of arrays and trees of arrays, sharded as they are.
            iterator: JSON, the data iterator's state; it must be the same in every process, so that any number of them
                can go on from it.
            metadata: JSON.
        """
        from orbax.checkpoint import v1 as ocp

        self.wait()
        path = self.directory / str(step)
        if jax.process_index() == 0:
            self._make_room(path)
            self._written.add(path)
        iterators = processes.gather(iterator)  # and so no process writes before the old folder is gone
        if any(other != iterators[0] for other in iterators):
            raise CheckpointError(f"the processes stand at different batches before the checkpoint of step {step}")
        extras = {"step": step, "iterators": [iterator], "metadata": metadata or {}}
        context = ocp.Context()
        context.memory.write_concurrent_bytes = self._write_bytes
        with context:
            response = ocp.save_checkpointables_async(path, _parts(state))
        self._pending = self._worker.submit(self._finish, path, response, extras)

    def _finish(self, path: Path, response: Any, extras: dict[str, Any]) -> None:
        response.result()
        if jax.process_index() != 0:
            return
        write_atomically(path / EXTRAS, json.dumps(extras))
        write_checksums(path)
        paths = [self.directory / str(step) for step in checkpoint_steps(self.stage_dir)[: -self.keep]]
        for path in filter(self._may_remove, paths):
            _remove(path)

    def wait(self) -> None:
        """Returns when the last save is whole on the disk; raises what it raised."""
        pending, self._pending = self._pending, None
        if pending is None:
            return
        try:
            pending.result()
        except OSError as error:
            raise CheckpointError(f"a checkpoint could not be written below {self.directory}: {error}") from error

    def close(self) -> None:
        """Waits for the last save and ends the background thread."""
        try:
            self.wait()
        finally:
            self._worker.shutdown()

    def __enter__(self) -> "CheckpointWriter":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _remove(path: Path) -> None:
    # Without its checksums it counts as unfinished, whatever interrupts the rest.
    (path / CHECKSUMS).unlink(missing_ok=True)
    shutil.rmtree(path)


def _free(path: Path) -> Path:
    return next(name for name in numbered(path) if not os.path.lexists(name))


def _is_tree(value: Any) -> bool:
    return not jax.tree_util.all_leaves([value])


def _parts(state: dict[str, Any]) -> dict[str, Any]:
    """What is saved under which name; orbax refuses a part without arrays."""
    parts = {name: value for name, value in state.items() if _is_tree(value)}
    parts[PROGRESS] = {name: value for name, value in state.items() if not _is_tree(value)}
    return {name: value for name, value in parts.items() if jax.tree.leaves(value)}


def restore_latest(stage_dir: str | Path, abstract_state: dict[str, Any]) -> Restored | None:
    """The newest checkpoint that is whole, or None if there is no finished one.

    Damaged checkpoints are set aside (renamed to `<step>.damaged`) once an older one has been read in their place.

    Args:
        abstract_state: the state as ShapeDtypeStructs with shardings; any, whatever mesh and however many processes
            wrote it.

    Raises:
        CheckpointError: if there are finished checkpoints but every one is damaged, or the state has another structure.
    """
    found = processes.of_first(lambda: _newest_whole(stage_dir))
    damaged, step = tuple(found["damaged"].values()), found["step"]
    if step is None and damaged:
        raise CheckpointError(
            f"{'; '.join(damaged)}; no checkpoint is left to fall back to: delete {stage_dir} to train the stage anew"
        )
    if step is None:
        return None
    path = checkpoint_path(stage_dir, step)
    state = _load_parts(path, _parts(abstract_state))
    extras = read_json(path / EXTRAS)
    if jax.process_index() == 0:
        _set_aside(found["damaged"])
    progress = state.pop(PROGRESS, {})
    state = {**abstract_state, **state, **progress}
    return Restored(step, state, _position(path, extras), extras["metadata"], damaged)


def _newest_whole(stage_dir: str | Path) -> dict[str, Any]:
    """The step of the newest checkpoint that is whole, or None, and a sentence for each damaged one after it."""
    damaged: dict[str, str] = {}
    for step in reversed(checkpoint_steps(stage_dir)):
        path = checkpoint_path(stage_dir, step)
        try:
            verify(path)
        except CheckpointError as error:
            damaged[str(path)] = f"the checkpoint {path} is damaged: {error}"
            continue
        return {"step": step, "damaged": damaged}
    return {"step": None, "damaged": damaged}


def _position(path: Path, extras: dict[str, Any]) -> Any:
    """The data iterator's state, which is the same for any number of processes; some wrote down one for each."""
    states = extras["iterators"]
    if any(state != states[0] for state in states):
        raise CheckpointError(f"the checkpoint {path} is damaged: its processes stood at different batches")
    return states[0]


def _set_aside(damaged: dict[str, str]) -> None:
    for path in map(Path, damaged):
        path.rename(_free(path.with_name(f"{path.name}.damaged")))


def _load_parts(path: Path, abstract: dict[str, Any]) -> dict[str, Any]:
    from orbax.checkpoint import v1 as ocp

    for name, tree in abstract.items():
        difference = _first_difference(_shapes(_metadata(path, name)), _shapes(tree))
        if difference:
            raise CheckpointError(
                f"the checkpoint {path} does not hold the state that was asked for: {name}/{difference}"
            )
    return ocp.load_checkpointables(path.resolve(), abstract)


def _metadata(path: Path, name: str) -> Any:
    """What a part holds, as a tree of shapes and dtypes; CheckpointError where there is no such part."""
    from orbax.checkpoint import v1 as ocp

    if not (path / name).is_dir():
        raise CheckpointError(f"the checkpoint {path} holds no {name!r}")
    return ocp.metadata(path.resolve(), name).metadata  # of all parts it would take several times as long


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    def shape(leaf: Any) -> tuple[int, ...]:
        if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):  # saved as its words
            leaf = jax.eval_shape(jax.random.key_data, leaf)
        return tuple(leaf.shape)

    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): shape(leaf) for path, leaf in leaves}


def _first_difference(old: dict[str, tuple[int, ...]], new: dict[str, tuple[int, ...]]) -> str | None:
    for name in sorted({*old, *new}):
        if old.get(name) != new.get(name):
            return f"{name} is {old.get(name, 'absent')} there and {new.get(name, 'absent')} here"
    return None


def load_shapes(stage_dir: str | Path, name: str = "ema") -> Any:
    """A part of the newest finished checkpoint as ShapeDtypeStructs; no array is read.

    Raises:
        CheckpointError: if there is no finished checkpoint, or it lacks the part.
    """
    steps = checkpoint_steps(stage_dir)
    if not steps:
        raise CheckpointError(f"{stage_dir} holds no finished checkpoint")
    found = _metadata(checkpoint_path(stage_dir, steps[-1]), name)
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), found)


def load_part(stage_dir: str | Path, name: str) -> tuple[Any, int]:
    """One part (`"params"`, `"ema"`) of the newest whole checkpoint, and its step; nothing else is read.

    Returns:
        A tree of numpy arrays, and the checkpoint's step.

    Raises:
        CheckpointError: if there is no finished checkpoint, or the part is damaged in all of them.
    """
    from orbax.checkpoint import v1 as ocp

    steps = checkpoint_steps(stage_dir)
    if not steps:
        raise CheckpointError(f"{stage_dir} holds no finished checkpoint")
    damaged = []
    for step in reversed(steps):
        path = checkpoint_path(stage_dir, step)
        try:
            verify(path, only=(name,))
        except CheckpointError as error:
            damaged.append(f"the checkpoint {path} is damaged: {error}")
            continue
        for sentence in damaged:
            logger.warning("%s; using step %d instead", sentence, step)
        abstract = jax.tree.map(lambda leaf: np.empty(leaf.shape, leaf.dtype), _metadata(path, name))
        return ocp.load_checkpointables(path.resolve(), {name: abstract})[name], step
    raise CheckpointError(
        f"{'; '.join(damaged)}; no checkpoint is left to fall back to: delete {stage_dir} to train the stage anew"
    )
