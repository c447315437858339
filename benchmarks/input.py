"""How many images a second the input pipeline delivers, alone: JPEG files of a folder, decoded as training has them.

python -m benchmarks.input                     # 4,000 images of 64 px, and 4,000 of 256 px made 64 px on the way
python -m benchmarks.input --out input.json    # the same figures as JSON too

The images are drawn from a seed: clouds of noise with more of it in low frequencies, as in photographs, and a few
shapes with hard edges, saved as JPEG of quality 90 with a caption beside each. `train_iterator` then reads them as
training does: cache=False, shuffled, captions through a tokenizer, batches of 128. The first batches are not counted;
the files are in the file system's cache. Then the same batches are taken at the pace of a device that wants `--demand`
images a second and needs no CPU, and the share of the time is given that it waits for a batch.
"""

import argparse
import importlib.metadata
import json
import os
import platform
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np

from dalle2_jax.data import Data, all_captions, open_source, train_iterator
from dalle2_jax.sharding import available_cores
from dalle2_jax.tokenizer import Tokenizer

COLORS = ("red", "green", "blue", "yellow", "purple", "orange", "white", "black")
SHAPES = ("circle", "square")
QUALITY, IMAGE_SIZE = 90, 64


def draw(rng: np.random.Generator, side: int) -> tuple[np.ndarray, str]:
    """An image uint8 [side, side, 3] of clouds and up to four shapes, and a caption."""
    from PIL import Image, ImageDraw

    pixels = np.zeros((side, side, 3), np.float32)
    cells = 2
    while cells <= side:
        strength = 70 / cells**0.5
        noise = rng.normal(0, strength / 2, (cells, cells, 3)) + rng.normal(0, strength, (cells, cells, 1))
        channels = [Image.fromarray(noise[..., c].astype(np.float32)) for c in range(3)]
        large = [np.asarray(channel.resize((side, side), Image.Resampling.BICUBIC)) for channel in channels]
        pixels += np.stack(large, axis=-1)
        cells *= 2
    image = Image.fromarray(np.clip(pixels + rng.uniform(60, 196, 3), 0, 255).astype(np.uint8))
    pen, said = ImageDraw.Draw(image), []
    for _ in range(rng.integers(1, 5)):
        color, shape = COLORS[rng.integers(len(COLORS))], SHAPES[rng.integers(len(SHAPES))]
        x, y, half = rng.uniform(0, side), rng.uniform(0, side), rng.uniform(side / 16, side / 4)
        put = pen.ellipse if shape == "circle" else pen.rectangle
        put((x - half, y - half, x + half, y + half), fill=color)
        said.append(f"a {color} {shape}")
    return np.asarray(image), " and ".join(said) + " before clouds"


def make_folder(folder: Path, count: int, side: int) -> int:
    """Draws `count` images into a folder that does not have them yet; their bytes on average."""
    from PIL import Image

    for number in range(count):
        path = folder / f"{number // 1000:03d}" / f"{number:06d}.jpg"
        if path.exists():
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        image, caption = draw(np.random.default_rng((side, number)), side)
        path.with_suffix(".txt").write_text(caption, encoding="utf-8")
        Image.fromarray(image).save(path, quality=QUALITY)
    return round(statistics.mean(path.stat().st_size for path in folder.rglob("*.jpg")))


def measure(folder: Path, batch_size: int, seconds: float, repeats: int, demand: float) -> dict:
    """Images a second, CPU time an image and waits in `repeats` times of `seconds`; seconds to open the folder."""
    data = Data(name="folder", folder=str(folder), data_dir=str(folder.parent / "cache"), cache=False)
    started = time.perf_counter()
    source = open_source(data, "train")
    found = {"images": len(source), "open_seconds": round(time.perf_counter() - started, 2)}
    tokenizer = Tokenizer.train(all_captions(data, "train", source), 512, 32)
    iterator = train_iterator(data, "train", tokenizer, batch_size, 0, image_size=IMAGE_SIZE, source=source)
    for _ in range(48):  # more than are fetched ahead
        batch = next(iterator)
    assert batch["image"].shape == (batch_size, IMAGE_SIZE, IMAGE_SIZE, 3)
    rates = [rate(iterator, batch_size, seconds) for _ in range(repeats)]
    waits = [wait(iterator, batch_size / demand, seconds) for _ in range(repeats)]
    iterator.close()
    found["images_per_second"], found["cpu_microseconds_per_image"] = map(list, zip(*rates, strict=True))
    return {**found, "waits": waits}


def rate(iterator, batch_size: int, seconds: float) -> tuple[float, float]:
    """Images a second, and microseconds of CPU an image, of all threads together."""
    started, worked, batches = time.perf_counter(), time.process_time(), 0
    while (taken := time.perf_counter() - started) < seconds:
        next(iterator)
        batches += 1
    images = batches * batch_size
    return round(images / taken, 1), round((time.process_time() - worked) / images * 1e6, 1)


def wait(iterator, step: float, seconds: float) -> float:
    """The share of the time that a device of `step` seconds a step waits for its next batch."""
    started, waited = time.perf_counter(), 0.0
    while (taken := time.perf_counter() - started) < seconds:
        time.sleep(step)
        asked = time.perf_counter()
        next(iterator)
        waited += time.perf_counter() - asked
    return round(waited / taken, 4)


def machine() -> dict:
    """Cores, load and versions: what the figures depend on."""
    from PIL import features

    libraries = ("numpy", "pillow", "grain", "tokenizers")
    return {
        "cores": available_cores(),
        "load": load(),
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in libraries},
        "libjpeg": features.version("libjpeg_turbo") or features.version("jpg"),
    }


def load() -> list[float]:
    """The average number of running programs in the last 1, 5 and 15 minutes."""
    return [round(one, 2) for one in os.getloadavg()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--count", type=int, default=4000, help="images a size (4000)")
    parser.add_argument("--sides", type=int, nargs="+", default=[64, 256], help="sides of the files' images (64 256)")
    parser.add_argument("--batch", type=int, default=128, help="images a batch (128)")
    parser.add_argument("--seconds", type=float, default=8.0, help="how long each time is (8)")
    parser.add_argument("--repeats", type=int, default=5, help="how many times; the median counts (5)")
    parser.add_argument("--demand", type=float, default=2000, help="images a second that the device wants (2000)")
    parser.add_argument("--folder", type=Path, help="keep the images here, for the next time")
    parser.add_argument("--out", type=Path, help="write the figures here, as JSON")
    options = parser.parse_args()
    report = {"machine": machine(), "batch": options.batch, "demand": options.demand, "sizes": {}}
    print(", ".join(f"{name} {value}" for name, value in report["machine"].items()))
    with tempfile.TemporaryDirectory() as temporary:
        for side in options.sides:
            folder = (options.folder or Path(temporary)) / str(side)
            size = make_folder(folder, options.count, side)
            found = measure(folder, options.batch, options.seconds, options.repeats, options.demand)
            report["sizes"][str(side)] = {"bytes": size, **found}
            rates, cpu, waits = found["images_per_second"], found["cpu_microseconds_per_image"], found["waits"]
            print(
                f"{side} px JPEG of {size:,} bytes to {IMAGE_SIZE} px: {statistics.median(rates):,.0f} images/s "
                f"(median of {len(rates)}, {min(rates):,.0f} to {max(rates):,.0f}), {statistics.median(cpu):.0f} us of "
                f"CPU an image; at {options.demand:,.0f} images/s a device waits {statistics.median(waits):.2%}",
                flush=True,
            )
    report["machine"]["load_after"] = load()
    print("load before", *report["machine"]["load"], "after", *report["machine"]["load_after"])
    if options.out:
        options.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
