"""The Transformer of 2017 on toy translations, which are made as they are needed; of the data set nothing is read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from dalle2_jax.checkpoint import LoadedStage
from dalle2_jax.errors import InputError
from dalle2_jax.lineage.encoder_decoder import EncoderDecoder, sequence_loss, token_accuracy
from dalle2_jax.lineage.encoder_decoder_sampling import greedy_decode
from dalle2_jax.lineage.sequence_tasks import Sequences, SequenceTask, make_sequences
from train.config.recipe import Batch, BatchSpec, Parameters, Recipe, Task


@dataclass(frozen=True, kw_only=True)
class EncoderDecoderRecipe(Recipe):
    """Trains `module` to translate the sequences of a task.

    sequences: the task. label_smoothing: 0.1 in the paper (`sequence_loss`).
    """

    kind: ClassVar[str] = "encoder_decoder"
    reads_captions: ClassVar[bool] = False
    training_fields: ClassVar[tuple[str, ...]] = ("sequences", "label_smoothing")

    module: EncoderDecoder
    sequences: SequenceTask = SequenceTask()
    label_smoothing: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        module, needed, length = self.module, self.sequences.vocabulary_size, self.sequences.length + 1
        if module.vocabulary_size < needed:
            raise InputError(
                f"{self.kind}.module.vocabulary_size is {module.vocabulary_size}, and {self.sequences.symbols} symbols "
                f"with padding, start and end are {needed} tokens; set {self.kind}.module.vocabulary_size={needed}"
            )
        if module.max_length < length:
            raise InputError(
                f"{self.kind}.module.max_length is {module.max_length}, and a sequence of {self.sequences.length} "
                f"symbols has an end too; set {self.kind}.module.max_length={length}, or a smaller sequences.length"
            )
        if not 0 <= self.label_smoothing < 1:
            raise InputError(f"{self.kind}.label_smoothing is {self.label_smoothing}; it must be 0 or more and below 1")

    def build(self, stages: Mapping[str, LoadedStage]) -> EncoderDecoderTask:
        return EncoderDecoderTask(recipe=self)


@dataclass(frozen=True, kw_only=True)
class EncoderDecoderTask(Task):
    """A sequence for each image of the batch, by the step's key and the image's number; in validation those that are
    held out.

    Metrics: cross_entropy, the loss without label smoothing, in nats a token; token_accuracy, of each token under the
    true ones before it; in validation also sequence_accuracy, of whole sequences as greedy decoding writes them.
    """

    recipe: EncoderDecoderRecipe

    @property
    def batch_spec(self) -> BatchSpec:
        return BatchSpec(image_size=1, captions=False)

    def init(self, key: jax.Array) -> Parameters:
        return self.module.init(key, *(jnp.zeros((1, 1), jnp.int32) for _ in range(2)))["params"]

    def _sequences(self, batch: Batch, key: jax.Array, held_out: bool) -> Sequences:
        # By a key an example, which is split over the devices as the batch is.
        keys = jax.vmap(jax.random.fold_in, (None, 0))(key, batch["index"])
        return make_sequences(keys, self.recipe.sequences, len(keys), held_out)

    def loss(self, params: Parameters, batch: Batch, key: jax.Array, frozen: Parameters, extra: None):
        sequences_key, dropout_key = jax.random.split(key)
        sequences = self._sequences(batch, sequences_key, held_out=False)
        loss, metrics = self._losses(params, sequences, deterministic=False, rngs={"dropout": dropout_key})
        return loss, metrics, extra

    def validate(self, params: Parameters, batch: Batch, key: jax.Array, frozen: Parameters) -> dict[str, jax.Array]:
        sequences = self._sequences(batch, key, held_out=True)
        loss, metrics = self._losses(params, sequences)
        labels = sequences.target[:, 1:]
        written = greedy_decode(self.module, params, sequences.source, labels.shape[1])
        return {"loss": loss, **metrics, "sequence_accuracy": (written == labels).all(axis=1).mean()}

    def _losses(self, params: Parameters, sequences: Sequences, **how: Any) -> tuple[jax.Array, dict[str, jax.Array]]:
        source, target, labels = sequences.source, sequences.target[:, :-1], sequences.target[:, 1:]
        logits = self.module.apply({"params": params}, source, target, **how)
        return sequence_loss(logits, labels, self.recipe.label_smoothing), {
            "cross_entropy": sequence_loss(logits, labels),
            "token_accuracy": token_accuracy(logits, labels),
        }
