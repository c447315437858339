"""Starting a stage from another run's instead of from nothing (`init_from` of a recipe)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from dalle2_jax.checkpoint import CheckpointError, StageRecord, load_stage, read_record, with_defaults
from dalle2_jax.errors import InputError
from dalle2_jax.layers.stacking import stack_layers, unstack_layers
from dalle2_jax.tokenizer import AnyTokenizer, ClipTokenizer, GlideTokenizer, Tokenizer, tokenizer_from_json
from train.config.recipe import Recipe, Task
from train.config.system import System
from train.recipes.masks import with_known_channels
from train.run.record import stage_record
from train.run.resume import first_difference

TOKEN_TABLE = "token_embedding/embedding"
TOKENS = {
    Tokenizer: "tokens learned from captions",
    ClipTokenizer: "those of CLIP's tokenizer",
    GlideTokenizer: "those of GLIDE's tokenizer",
    type(None): "those of no tokenizer",
}
# What may differ: shapes tell where it matters, tables of tokens are fitted, and the rest is how it is computed.
ADAPTED = (
    "vocabulary_size",
    "image_size",
    "attention_resolutions",
    "dropout",
    "scan_layers",
    "remat",
    "dtype",
    "param_dtype",
)
# Whether a network sees what is known of an image: one that does not can start one that does.
INPAINTING = "inpainting"
FIRST_KERNEL = "unet/conv_in/kernel"
# What a network's numbers mean.
PROCESS = ("schedule", "timesteps", "prediction", "zero_terminal_snr")


def inherited_tokenizer(system: System, log: Callable[[str], None]) -> AnyTokenizer | None:
    """The tokenizer of the first stage that another one starts from, if the system has room for it.

    Raises:
        InputError: if a stage is to start from one that is not there.
    """
    for name, recipe in system.stages.items():
        if recipe.init_from is None:
            continue
        text = _read(name, recipe).tokenizer
        if text is None:  # an upsampler of public weights
            continue
        tokenizer = tokenizer_from_json(text)
        if tokenizer.context_length != system.context_length or tokenizer.vocabulary_size > system.vocabulary_size:
            log(
                f"{recipe.init_from} has a tokenizer of {tokenizer.vocabulary_size} tokens and captions of "
                f"{tokenizer.context_length}; this system's own has up to {system.vocabulary_size} and "
                f"{system.context_length}, so a new one is made of the captions"
            )
            return None
        log(f"the tokenizer is that of {recipe.init_from}")
        return tokenizer
    return None


def initial_parameters(name: str, task: Task, tokenizer: AnyTokenizer | None, log: Callable[[str], None]) -> Any:
    """The averaged parameters of the stage that the recipe's `init_from` names, fitted to this task.

    Tables of token embeddings follow the tokens: a token that both tokenizers have keeps its row, a new one gets a
    fresh row. A network that is to see what is known of an image, started from one that does not, starts with weights
    of zero for that, and so gives what the other gives. The optimizer and the average start afresh in any case.

    Raises:
        InputError: if the other stage is missing or damaged, of another kind, differs in a parameter's shape, or has a
            table for another kind of tokenizer.
    """
    recipe = task.recipe
    record = check_start(name, recipe)
    try:
        other = load_stage(recipe.init_from)
    except CheckpointError as error:
        raise InputError(f"{name} cannot start from {recipe.init_from}: {error}") from error
    shapes = jax.eval_shape(task.init, jax.random.key(recipe.seed))
    ours = _by_path(shapes)
    theirs = _laid_out(other.params, ours)
    if getattr(recipe.module, INPAINTING, False) and not getattr(other.module, INPAINTING):
        theirs[FIRST_KERNEL] = with_known_channels(theirs[FIRST_KERNEL], recipe.module.unet.patch)
    for path in [*ours, *theirs]:
        if (path in ours) != (path in theirs):
            where = "this one" if path in ours else "that one"
            raise InputError(
                f"{name} cannot start from {recipe.init_from}: {path} is a parameter of {where} alone; set "
                f"{name}.module as it is there, or leave init_from out"
            )
    text = record.tokenizer
    their_tokenizer = None if text is None else tokenizer_from_json(text)
    fitted = []
    for path, ours_shape, theirs_shape in ((path, ours[path].shape, theirs[path].shape) for path in ours):
        is_table = path.endswith(TOKEN_TABLE) and ours_shape[1:] == theirs_shape[1:]
        if is_table and (their_tokenizer != tokenizer or ours_shape != theirs_shape):
            if type(their_tokenizer) is not type(tokenizer):
                raise InputError(
                    f"{name} cannot start from {recipe.init_from}: it reads {TOKENS[type(their_tokenizer)]} and this "
                    f"run's tokens are {TOKENS[type(tokenizer)]}; leave init_from out"
                )
            fitted.append(path)
        elif ours_shape != theirs_shape:
            raise InputError(
                f"{name} cannot start from {recipe.init_from}: {path} is {theirs_shape} there and {ours_shape} "
                f"here; set {name}.module (and the system's context_length) as it is there, or leave init_from out"
            )
    result = dict(theirs)
    if fitted:
        fresh = _by_path(jax.device_get(jax.jit(task.init)(jax.random.key(recipe.seed))))
        for path in fitted:
            result[path], known = _fit_table(fresh[path], theirs[path], tokenizer, their_tokenizer)
            log(
                f"{name}: {known} of {tokenizer.vocabulary_size} tokens are known to {recipe.init_from}; the others "
                "start afresh"
            )
    log(f"{name} starts from {recipe.init_from} (step {record.step}); optimizer and average start afresh")
    return jax.tree.unflatten(jax.tree.structure(shapes), [result[path] for path in ours])


def check_start(name: str, recipe: Recipe) -> StageRecord:
    """What is recorded of the stage that a recipe starts from, if that is the same network for the same task.

    Raises:
        InputError: if it is missing, of another kind, or differs in what shapes do not show (heads, activations, what
            is predicted).
    """
    record, ours = _read(name, recipe), stage_record(recipe, name)
    if record.kind != recipe.kind:
        raise InputError(
            f"{name}.init_from names {recipe.init_from}, which is of kind {record.kind} and not {recipe.kind}"
        )
    there, here = (one.module["fields"].get(INPAINTING, False) for one in (record, ours))
    if there and not here:
        raise InputError(
            f"{name} cannot start from {recipe.init_from}: that network sees what is known of an image and this one "
            f"would not; set {name}.module.inpainting=true"
        )
    module, process = with_defaults(record.module), with_defaults(record.process)
    difference = first_difference(_network(module), _network(ours.module), "module")
    for field in PROCESS if difference is None else ():
        there, here = ((one or {}).get("fields", {}).get(field) for one in (process, ours.process))
        if there != here:
            difference = f"process.{field}", there, here
    if difference:
        path, there, here = difference
        raise InputError(
            f"{name} cannot start from {recipe.init_from}: {path} is {there!r} there and {here!r} here; set "
            f"{name}.{path} as it is there, or leave init_from out"
        )
    return record


def _network(module: Any) -> Any:
    """A module's record without the fields of `ADAPTED` and `INPAINTING`, at any depth."""
    if isinstance(module, dict):
        return {key: _network(value) for key, value in module.items() if key not in (*ADAPTED, INPAINTING)}
    return module


def _read(name: str, recipe: Recipe) -> StageRecord:
    try:
        return read_record(recipe.init_from)
    except CheckpointError as error:
        raise InputError(
            f"{name}.init_from: {error}; name the folder of a trained stage, such as runs/emoji/{name}"
        ) from error


def _laid_out(params: Any, ours: dict[str, Any]) -> dict[str, Any]:
    """{path: parameter}, with layers stacked or each by itself if ours are so then."""
    forms = (_by_path(form(params)) for form in (lambda params: params, stack_layers, unstack_layers))
    return next((form for form in forms if form.keys() == ours.keys()), _by_path(params))


def _by_path(tree: Any) -> dict[str, Any]:
    flat, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): value for path, value in flat}


def _fit_table(
    fresh: np.ndarray, theirs: np.ndarray, tokenizer: AnyTokenizer, their_tokenizer: AnyTokenizer
) -> tuple[np.ndarray, int]:
    """A table with their rows for the tokens that both have; and how many those are."""
    places = their_tokenizer.token_rows()
    table, known = fresh.copy(), 0
    for token, row in tokenizer.token_rows().items():
        if token in places:
            table[row] = theirs[places[token]]
            known += 1
    return table, known
