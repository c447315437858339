"""A run's data and tokenizer, opened when they are first asked for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from dalle2_jax.checkpoint import StageFolder
from dalle2_jax.data import all_captions, evaluation_batches, open_source, train_iterator
from dalle2_jax.data.source import Source
from dalle2_jax.errors import InputError
from dalle2_jax.sharding import batch_parts, batch_sharding, own_rows, processes
from dalle2_jax.tokenizer import AnyTokenizer, Tokenizer, tokenizer_from_json
from train.config.recipe import Recipe, Task
from train.config.system import System
from train.run.given import given_tokenizer
from train.run.init_from import inherited_tokenizer
from train.run.plan import check_image_size
from train.run.record import Log


class Feed:
    """The run's tokenizer and the system's data, opened when they are first asked for."""

    def __init__(self, system: System, run_dir: Path, log: Log = print):
        self.system, self.run_dir, self.log = system, run_dir, log
        self._sources: dict[str, Any] = {}
        self._logged: set[str] = set()
        self._tokenizer: AnyTokenizer | None = None

    def source(self, split: str) -> Any:
        if split not in self._sources:
            source = self._sources[split] = processes.first_then_others(lambda: open_source(self.system.data, split))
            processes.check_same(f"the split {split!r} of {source.name}", len(source))
            if source.notice and source.notice not in self._logged:
                self._logged.add(source.notice)
                self.log(source.notice)
        return self._sources[split]

    def check(self, name: str, recipe: Recipe) -> None:
        """Raises InputError for a stage that asks for larger batches or images than the data have."""
        split = self.system.data.train_split
        source = self.source(split)
        if not len(source):
            raise InputError(f"the split {split!r} of {source.name} is empty; there is nothing to train on")
        if recipe.batch_size > len(source):
            raise InputError(
                f"{name}.batch_size is {recipe.batch_size} and the split {split!r} of {source.name} has "
                f"{len(source)} images; set {name}.batch_size={1 << len(source).bit_length() - 1} or less"
            )
        if recipe.classes is not None:
            check_classes(name, recipe.classes, source)
        if recipe.output_size is not None and self.system.data.image_size is None:
            check_image_size(name, recipe, source.images([0]).shape[1])

    @property
    def tokenizer(self) -> AnyTokenizer:
        """That of the given stages, of the run's other ones, of one that is started from, or one of the captions."""
        if self._tokenizer is None:
            known = given_tokenizer(self.system) or self._recorded()
            self._tokenizer = known or inherited_tokenizer(self.system, self.log) or self._train()
            processes.check_same("the tokenizer", self._tokenizer.to_json())
        return self._tokenizer

    def _recorded(self) -> AnyTokenizer | None:
        for name in self.system.stages:
            stage = StageFolder(self.run_dir / name)
            if stage.step is None or stage.record.tokenizer is None:
                continue
            tokenizer = tokenizer_from_json(stage.record.tokenizer)
            if tokenizer.context_length != self.system.context_length:
                raise InputError(
                    f"the tokenizer in {stage.path} cuts captions at {tokenizer.context_length} tokens and the config "
                    f"says {self.system.context_length}; choose another --run, or delete {self.run_dir}"
                )
            return tokenizer
        return None

    def _train(self) -> Tokenizer:
        split = self.system.data.train_split
        captions = all_captions(self.system.data, split, self.source(split))
        return Tokenizer.train(captions, self.system.vocabulary_size, self.system.context_length)

    def training(self, task: Task, mesh: Mesh) -> Any:
        """Endless batches of the training split."""
        recipe, spec, split = task.recipe, task.batch_spec, self.system.data.train_split
        return train_iterator(
            self.system.data,
            split,
            self.tokenizer if spec.captions else None,
            recipe.batch_size,
            recipe.seed,
            image_size=spec.image_size,
            labels=spec.labels,
            transform=spec.transform,
            rows=own_rows(batch_sharding(mesh), recipe.batch_size),
            source=self.source(split),
        )

    def validation(self, task: Task, mesh: Mesh) -> list[dict[str, Any]]:
        """The recipe's whole batches, or as many examples as the split has, in batches that divide over the mesh."""
        recipe, spec, split = task.recipe, task.batch_spec, self.system.data.validation_split
        source, parts = self.source(split), batch_parts(mesh)
        size = min(recipe.batch_size, len(source) // parts * parts)
        count = min(recipe.validation_batches, len(source) // size) if size else 0
        if not count:
            return []
        return evaluation_batches(
            self.system.data,
            split,
            self.tokenizer if spec.captions else None,
            size,
            count * size,
            image_size=spec.image_size,
            with_captions=True,
            labels=spec.labels,
            rows=own_rows(batch_sharding(mesh), size),
            source=source,
        )


def check_classes(name: str, classes: int, source: Source) -> None:
    """Raises InputError where a stage is conditional on classes that the data do not name, or on fewer of them."""
    if source.class_names is None:
        raise InputError(
            f"{name} is conditional on classes and the data set {source.name} has no labels; take one with the TFDS "
            "feature 'label', such as mnist or cifar10, or another condition"
        )
    if len(source.class_names) > classes:
        raise InputError(
            f"the data set {source.name} has {len(source.class_names)} classes and {name} is made for {classes}; set "
            f"{name}.module.num_classes={len(source.class_names)}"
        )
