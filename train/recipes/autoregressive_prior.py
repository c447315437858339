"""The autoregressive prior: from a caption to the codes of the CLIP image embedding of an image of it (Sec. 2.2)."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from dalle2_jax.checkpoint import LoadedStage
from dalle2_jax.errors import InputError
from dalle2_jax.layers.embedding import unit_norm
from dalle2_jax.prior import AutoregressivePrior, AutoregressiveSampling, CodecFit, caption_condition
from dalle2_jax.prior.autoregressive import stored
from dalle2_jax.prior.codec import EDGES
from dalle2_jax.sharding.mesh import replicate
from train.config.recipe import Batch, BatchSpec, Parameters, Recipe, Task, check_share
from train.recipes.embeddings import FrozenClip


@dataclass(frozen=True, kw_only=True)
class AutoregressivePriorRecipe(Recipe):
    """Trains `module` on the codes of the frozen CLIP's image embeddings.

    text_drop: how often the caption is dropped (10% in the paper). Before the first step the codec is fitted to
    codec_examples training images: edges, percentile: see `CodecFit.codec`. sampling: what the stage records as its
    defaults.
    """

    kind: ClassVar[str] = "prior"
    needs: ClassVar[tuple[str, ...]] = ("clip",)
    training_fields: ClassVar[tuple[str, ...]] = ("text_drop", "edges", "percentile", "codec_examples")

    module: AutoregressivePrior
    sampling: AutoregressiveSampling = AutoregressiveSampling()
    text_drop: float = 0.1
    edges: str = "uniform"
    percentile: float = 0.1
    codec_examples: int = 262_144

    def __post_init__(self) -> None:
        super().__post_init__()
        check_share("prior.text_drop", self.text_drop)
        if self.edges not in EDGES:
            raise InputError(f"prior.edges is {self.edges!r}; it must be {' or '.join(EDGES)}")
        if not 0 <= self.percentile < 50:
            raise InputError(f"prior.percentile is {self.percentile}; it must lie in 0 to below 50")
        if self.codec_examples <= self.module.components:
            raise InputError(
                f"prior.codec_examples is {self.codec_examples}; for {self.module.components} principal components it "
                "must be more than they are"
            )

    def build(self, stages: Mapping[str, LoadedStage]) -> AutoregressivePriorTask:
        clip, module = stages["clip"], self.module
        if module.embedding_size != clip.module.embedding_size:
            raise InputError(
                f"the prior predicts embeddings of size {module.embedding_size} but CLIP's have "
                f"{clip.module.embedding_size}; set the prior's module.embedding_size={clip.module.embedding_size}"
            )
        if module.unit_norm != clip.module.unit_norm:
            raise InputError(
                f"the prior's module.unit_norm is {module.unit_norm} and CLIP's is {clip.module.unit_norm}; set the "
                "prior's as CLIP's"
            )
        return AutoregressivePriorTask(recipe=self, clip=FrozenClip.of(clip), frozen={"clip": clip.params})

    def describe(self) -> dict[str, Any]:
        return {**super().describe(), "sampling": self.sampling}


@dataclass(frozen=True, kw_only=True)
class AutoregressivePriorTask(Task):
    """Predicts the codes of CLIP's image embeddings under CLIP's reading of the captions."""

    recipe: AutoregressivePriorRecipe
    clip: FrozenClip

    @property
    def batch_spec(self) -> BatchSpec:
        return BatchSpec(image_size=self.clip.image_size)

    def gradient_transformation(self) -> optax.GradientTransformation:
        """The codec is not trained."""
        parts = {"trained": super().gradient_transformation(), "codec": optax.set_to_zero()}
        return optax.multi_transform(
            parts, lambda params: {name: "codec" if name == "codec" else "trained" for name in params}
        )

    def init(self, key: jax.Array) -> Parameters:
        module, length = self.module, self.module.context_length
        text = jnp.zeros((1, length), jnp.int32)
        if not module.reads_tokens:
            text = jnp.zeros((1, length, self.clip.module.text.width))
        codes, similarity = jnp.zeros((1, module.components), jnp.int32), jnp.zeros(1, jnp.int32)
        embedding, mask = jnp.zeros((1, self.clip.module.embedding_size)), jnp.ones((1, length), bool)
        return module.init(key, codes, similarity, embedding, text, mask)["params"]

    def fit(
        self, batches: Iterator[Batch], frozen: Parameters, mesh: Mesh, log: Callable[[str], None]
    ) -> dict[str, Any]:
        """The codec of the training images' embeddings."""
        recipe, module = self.recipe, self.module
        embed = jax.jit(self._embed, out_shardings=replicate(mesh))
        found = CodecFit(module.embedding_size)
        count = -(-recipe.codec_examples // recipe.batch_size)
        for _ in range(count):
            found.add(*map(np.asarray, embed(next(batches), frozen)))
        sizes = module.components, module.buckets, module.similarity_buckets
        codec = found.codec(*sizes, recipe.edges, recipe.percentile)
        kept = float(codec.pca.variances.sum() / found.moments.variance)
        log(
            f"the codec is fitted to {found.moments.count} embeddings; its components hold {kept:.2%} of their variance"
        )
        return {"codec": stored(codec)}

    def _embed(self, batch: Batch, frozen: Parameters) -> tuple[jax.Array, jax.Array]:
        """CLIP's embeddings `[b, z]` of the images and of the captions."""
        captions = self.clip.encode_captions(frozen["clip"], batch)
        return self.clip.embed_images(frozen["clip"], batch), captions.embedding

    def loss(self, params: Parameters, batch: Batch, key: jax.Array, frozen: Parameters, extra: None):
        losses, metrics = self._losses(params, batch, key, frozen, training=True)
        return losses.mean(), metrics, extra

    def validate(self, params: Parameters, batch: Batch, key: jax.Array, frozen: Parameters) -> dict[str, jax.Array]:
        """The loss; what the codec by itself loses of held-out embeddings (mean squared error, of embeddings of unit
        variance a dimension) and how many of their components it clips; and the cosine of what the network thinks most
        probable, each code under the true ones before it, with the true embedding."""
        module, variables = self.module, {"params": params}
        losses, metrics = self._losses(params, batch, key, frozen, training=False)
        embedding, codes, logits = metrics.pop("embedding"), metrics.pop("codes"), metrics.pop("logits")
        coded = module.apply(variables, codes, method="decode")
        likely = module.apply(variables, jnp.argmax(logits, axis=-1).astype(jnp.int32), method="decode")
        scale = embedding.shape[-1] / jnp.mean(jnp.sum(embedding**2, axis=-1))
        return {
            "loss": losses.mean(),
            **metrics,
            "codec_mse": scale * jnp.mean((coded - embedding) ** 2),
            "clipped": module.apply(variables, embedding, method="beyond"),
            "cosine": jnp.mean(jnp.sum(unit_norm(likely) * unit_norm(embedding), axis=-1)),
        }

    def _losses(
        self, params: Parameters, batch: Batch, key: jax.Array, frozen: Parameters, training: bool
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Nats a code `[b, components]`, and metrics."""
        embedding = jax.lax.stop_gradient(self.clip.embed_images(frozen["clip"], batch))
        captions = jax.lax.stop_gradient(self.clip.encode_captions(frozen["clip"], batch))
        apply = functools.partial(self.module.apply, {"params": params})
        codes, similarity = apply(embedding, captions.embedding, method="encode")
        drop_key, dropout_key = jax.random.split(key)
        keep = jax.random.uniform(drop_key, codes.shape[:1]) >= (self.recipe.text_drop if training else 0.0)
        logits = apply(
            codes,
            similarity,
            **caption_condition(self.module, captions),
            keep_text=keep,
            deterministic=not training,
            rngs={"dropout": dropout_key},
        )
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, codes)
        metrics = {"accuracy": jnp.mean(jnp.argmax(logits, axis=-1) == codes)}
        if not training:
            metrics |= {"embedding": embedding, "codes": codes, "logits": logits}
        return losses, metrics
