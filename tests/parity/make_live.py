"""What `make parity` alone compares with: open_clip's and transformers' tokens, and a folder that diffusers saved.

    python -m tests.parity.make_live FOLDER [GLIDE, a checkout of openai/glide-text2im]

The vocabulary is that of open_clip's wheel, put into FOLDER in both layouts.
"""

import gzip
import json
import random
import shutil
import sys
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path

import numpy as np

from tests.parity import torchvision_shim  # noqa: F401

STRINGS, LONG = 10_000, 2000
CAPTIONS = (
    "a photo of an astronaut riding a horse",
    "portrait of an old monk, highly detailed",
    "woman: medium-dark skin tone",
    "flag: Åland Islands",
    "keycap: *",
    "A Small RED Circle",
)
EMOJI = ("😀", "👩🏽‍🚀", "🏳️‍🌈", "👨‍👩‍👧", "1️⃣", "🇫🇷", "☺️", "❤")
HTML = ("&amp;", "&lt;b&gt;", "&amp;lt;", "&eacute;", "&#39;", "&nbsp;", "<p>", "&quot;hi&quot;", "&#x1F600;")
ODD = (
    "Ã©",
    "â€œquoteâ€\x9d",
    "Â£5",
    "ï¬",
    "ﬁne",
    "＃ｆｕｌｌ",
    "e\u0301",
    "İstanbul",
    "ǅ",
    "ß",
    "ΐ",
    "…",
    "“q”",
    "don’t",
)
ENGLISH = ("I'll", "we've", "THEY'RE", "it's", "'S", "don't", "O'Neill", "naïve", "café", "Zürich")
CONTROL = ("\x00", "\x07", "\x1b[31m", "\u200b", "\u200d", "\ufeff", "\u202e", "\x85", "\u2028", "\xa0", "\t", "\r\n")
RANGES = ((33, 126), (0xA1, 0x17F), (0x370, 0x5FF), (0x4E00, 0x4FFF), (0x900, 0x97F), (0x1F300, 0x1F6FF))


def words(choose: random.Random) -> str:
    kind = choose.random()
    for share, of in ((0.3, CAPTIONS), (0.4, EMOJI), (0.5, HTML), (0.6, ODD), (0.68, CONTROL), (0.75, ENGLISH)):
        if kind < share:
            return choose.choice(of)
    if kind < 0.87:
        return "".join(chr(choose.randint(*choose.choice(RANGES))) for _ in range(choose.randint(1, 8)))
    if kind < 0.94:
        return str(choose.randint(0, 10**6))
    return "".join(choose.choice("abcdefghijklmnopqrstuvwxyz'-!?.,") for _ in range(choose.randint(1, 12)))


def strings() -> list[str]:
    """Captions, emoji, accents, html, control characters; each hundredth has 2,000 characters."""
    choose, made = random.Random(0), []
    for number in range(STRINGS):
        if number % 100 == 0:
            made.append("".join(words(choose) + " " for _ in range(600))[:LONG])
        else:
            gap = choose.choice((" ", "", " ", "  "))
            made.append(gap.join(words(choose) for _ in range(choose.randint(1, 14))))
    return made


def tokens(folder: Path) -> None:
    """vocabulary/ with `vocab.json` and `merges.txt`, the packed file beside it, and tokens.npz."""
    from open_clip.tokenizer import SimpleTokenizer
    from transformers import CLIPTokenizer

    packed = Path(find_spec("open_clip").origin).parent / "bpe_simple_vocab_16e6.txt.gz"
    shutil.copy(packed, folder / packed.name)
    theirs = SimpleTokenizer()
    vocabulary = folder / "vocabulary"
    vocabulary.mkdir(exist_ok=True)
    names = sorted(theirs.encoder, key=theirs.encoder.get)[:-2] + ["<|startoftext|>", "<|endoftext|>"]
    (vocabulary / "vocab.json").write_text(json.dumps({name: number for number, name in enumerate(names)}))
    lines = gzip.decompress(packed.read_bytes()).decode().split("\n")[1 : 49_152 - 256 - 2 + 1]
    (vocabulary / "merges.txt").write_text("#version: 0.2\n" + "\n".join(lines) + "\n")
    settings = {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77, "pad_token": "<|endoftext|>"}
    settings |= {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>"}
    (vocabulary / "tokenizer_config.json").write_text(json.dumps(settings))
    made = strings()
    fast = CLIPTokenizer.from_pretrained(vocabulary)
    found = fast(made, padding="max_length", truncation=True, max_length=77, return_tensors="np")
    np.savez_compressed(
        folder / "tokens.npz",
        strings=np.array(json.dumps(made)),
        open_clip=theirs(made).numpy().astype(np.int32),
        transformers=found["input_ids"].astype(np.int32),
        transformers_mask=found["attention_mask"].astype(bool),
    )
    print(f"tokens.npz: {len(made)} strings")


def glide_tokens(folder: Path, checkout: Path) -> None:
    """glide_vocabulary/, that of a checkout of openai/glide-text2im, and glide_tokens.npz."""
    source = checkout / "glide_text2im" / "tokenizer"
    spec = spec_from_file_location("bpe", source / "bpe.py")
    bpe = module_from_spec(spec)
    spec.loader.exec_module(bpe)
    vocabulary = folder / "glide_vocabulary"
    vocabulary.mkdir(exist_ok=True)
    for name in ("encoder.json.gz", "vocab.bpe.gz"):
        shutil.copy(source / name, vocabulary / name)
    encoder, made = bpe.get_encoder(), strings()
    rows = [encoder.padded_tokens_and_mask(encoder.encode(one), 128) for one in made]
    tokens, mask = zip(*rows, strict=True)
    np.savez_compressed(
        folder / "glide_tokens.npz",
        strings=np.array(json.dumps(made)),
        tokens=np.asarray(tokens, np.int32),
        mask=np.asarray(mask),
    )
    print(f"glide_tokens.npz: {len(made)} strings")


def saved_pipelines(folder: Path) -> None:
    """karlo/ and variation/, as `save_pretrained` writes them, of the small networks of make_karlo.py."""
    from diffusers import UnCLIPImageVariationPipeline, UnCLIPPipeline
    from transformers import CLIPImageProcessorPil, CLIPTokenizer

    from tests.parity.karlo_folder import write_vocabulary
    from tests.parity.make_karlo import CONTEXT, VOCABULARY, networks, schedulers

    small = folder / "small_vocabulary"
    shutil.rmtree(small, ignore_errors=True)
    write_vocabulary(small, VOCABULARY)
    tokenizer = CLIPTokenizer(str(small / "vocab.json"), str(small / "merges.txt"), pad_token="!")
    tokenizer.model_max_length = CONTEXT
    built, plans = networks(), schedulers()
    image_encoder = built.pop("image_encoder")
    UnCLIPPipeline(tokenizer=tokenizer, **built, **plans).save_pretrained(folder / "karlo")
    del built["prior"], plans["prior_scheduler"]
    UnCLIPImageVariationPipeline(
        tokenizer=tokenizer,
        image_encoder=image_encoder,
        feature_extractor=CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}),
        **built,
        **plans,
    ).save_pretrained(folder / "variation")
    print("karlo/ and variation/")


if __name__ == "__main__":
    tokens(Path(sys.argv[1]))
    if len(sys.argv) > 2:
        glide_tokens(Path(sys.argv[1]), Path(sys.argv[2]))
    saved_pipelines(Path(sys.argv[1]))
