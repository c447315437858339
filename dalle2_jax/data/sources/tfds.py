"""TFDS builders by name, read as array records with random access."""

from __future__ import annotations

import sys

from dalle2_jax.data.source import LABEL
from dalle2_jax.errors import InputError, nearest

CAPTION_NAMES = ("captions", "caption", "text", LABEL)


def open_builder(name: str, config: str | None, data_dir: str, changes: dict[str, int]):
    """The TFDS builder of a data set, prepared; `changes` are settings of captioned_shapes alone."""
    import tensorflow_datasets as tfds

    if name == "captioned_shapes":
        from dalle2_jax.data.sources import captioned_shapes

        return captioned_shapes.prepare(data_dir, config or "one_object", **changes)
    if name == "emoji":
        from dalle2_jax.data.sources import emoji

        return emoji.prepare(data_dir, config)
    return _prepared(tfds, name if config is None else f"{name}/{config}", data_dir)


def open_records(name: str, builder, split: str):
    """(TFDS data source with undecoded images, image feature, caption feature, class names or None) of one split.

    The class names are those of the feature `LABEL`.
    """
    import tensorflow_datasets as tfds

    if not {part.split("[")[0] for part in split.split("+")} <= set(builder.info.splits):
        raise InputError(f"the data set {name} has no split {split!r}; it has {', '.join(builder.info.splits)}")
    features = builder.info.features
    image = next((key for key, feature in features.items() if isinstance(feature, tfds.features.Image)), None)
    caption = next((key for key in CAPTION_NAMES if key in features), None)
    if image is None or caption is None:
        raise InputError(
            f"the data set {name} needs an image and one of {', '.join(CAPTION_NAMES)}; it has {', '.join(features)}"
        )
    label = features[LABEL] if LABEL in features else None
    class_names = tuple(label.names) if isinstance(label, tfds.features.ClassLabel) else None
    records = builder.as_data_source(split=split, decoders={image: tfds.decode.SkipDecoding()})
    return records, image, caption, class_names


def _prepared(tfds, name: str, data_dir: str):
    try:
        builder = tfds.builder(name, data_dir=data_dir, file_format="array_record")
    except tfds.core.DatasetNotFoundError as error:
        known = ["captioned_shapes", "emoji", "folder", *tfds.list_builders(with_community_datasets=False)]
        near = nearest(name, known, cutoff=0.5)
        hint = f"; did you mean {near}?" if near else "; captioned_shapes needs no download"
        raise InputError(f"there is no data set {name!r}{hint}") from error
    except ValueError as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"the data set {name} cannot be opened ({reason}); try another data.config") from error
    if not builder.is_prepared():
        print(f"preparing {name} under {data_dir}", file=sys.stderr, flush=True)
        try:
            builder.download_and_prepare()
        except Exception as error:  # whatever a download or a builder may raise
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            raise InputError(f"the data set {name} could not be prepared under {data_dir} ({reason})") from error
    return builder
