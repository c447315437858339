"""configs/mnist.py on a small set with MNIST's features: trained, and sampled from by class."""

import dataclasses
import io

import jax
import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

import dalle2_jax
from configs import mnist
from dalle2_jax.errors import InputError
from tests import cascade

SIZE, CLASSES = 28, 10


class LittleDigits(tfds.core.GeneratorBasedBuilder):
    """As TFDS has `mnist`: grey images of 28 px and a label; here a bar whose place is its class."""

    VERSION = tfds.core.Version("1.0.0")
    url_infos = None

    def _info(self):
        image = tfds.features.Image(shape=(SIZE, SIZE, 1))
        features = {"image": image, "label": tfds.features.ClassLabel(num_classes=CLASSES)}
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples(160), "test": self._generate_examples(20)}

    def _generate_examples(self, count):
        for i in range(count):
            pixels = np.zeros((SIZE, SIZE), np.uint8)
            pixels[:, 2 * (i % CLASSES) + 4] = 255
            file = io.BytesIO()
            Image.fromarray(pixels).save(file, "PNG")
            file.seek(0)
            yield i, {"image": file, "label": i % CLASSES}


@pytest.mark.slow
def test_mnists_systems_are_trained_and_sampled_by_class(tmp_path, monkeypatch):
    monkeypatch.setitem(mnist.SETS, "little_digits", mnist.SETS["mnist"])
    full = mnist.system("little_digits")
    assert full.stages["gan"].module == dataclasses.replace(mnist.system("mnist").stages["gan"]).module
    ddpm = full.stages["ddpm"].module
    unet = ddpm.unet.clone(channels=8, channel_multipliers=(1,), head_channels=8, groups=4, attention_resolutions=())
    short = {
        "steps": 2,
        "batch_size": 8,
        "log_every": 1,
        "validate_every": 2,
        "validation_batches": 1,
        "preview_every": 0,
        "checkpoint_every": 2,
    }
    stages = {name: dataclasses.replace(recipe, **short) for name, recipe in full.stages.items()}
    stages["ddpm"] = dataclasses.replace(stages["ddpm"], module=ddpm.clone(unet=unet))
    data = dataclasses.replace(full.data, data_dir=str(tmp_path / "data"))
    result, _ = cascade.train(dataclasses.replace(full, data=data, stages=stages), tmp_path / "run")
    assert result.finished
    model = dalle2_jax.load(tmp_path / "run" / "ddpm")
    images = model.generate(jax.random.key(0), ["7", "3"], 2, steps="2")
    assert images.shape == (4, SIZE, SIZE, 3) and (images == images[..., :1]).all()
    for label in ("10", "seven", "-1"):
        with pytest.raises(InputError, match=f"'{label}' is no class of the stage ddpm; its classes are 0 to 9"):
            model.generate(jax.random.key(0), label)
    assert dalle2_jax.load(tmp_path / "run" / "gan").generate(jax.random.key(0), count=2).shape == (2, SIZE, SIZE, 3)


@pytest.mark.parametrize("dataset", ["mnist", "cifar10", "anything_else"])
def test_every_set_has_its_size(dataset):
    system = mnist.system(dataset)
    size, channels, classes = mnist.SETS.get(dataset, (32, 3, 10))
    for recipe in system.stages.values():
        assert recipe.output_size == size and recipe.module.channels == channels
    assert system.stages["ddpm"].module.num_classes == classes and system.data.name == dataset
    assert system.stages["ddpm"].horizontal_flip == (channels == 3)
    assert system.stages["vae"].module.likelihood == ("bernoulli" if channels == 1 else "discretized_gaussian")
