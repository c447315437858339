"""The emoji: the table, the captions, the splits; and the images, where this machine has the font."""

import os
from pathlib import Path

import numpy as np
import pytest

from dalle2_jax.data import Data, open_source
from dalle2_jax.data.sources import emoji
from dalle2_jax.data.sources.emoji import Entry, captions, person_and_tone, prepare, read_table, split_of, table_version

TABLE = """# emoji-test.txt
# Version: 15.0
# group: Smileys & Emotion
# subgroup: face-smiling
1F600                                                  ; fully-qualified     # \U0001f600 E1.0 grinning face
263A FE0F                                              ; fully-qualified     # ☺️ E0.6 smiling face
263A                                                   ; unqualified         # ☺ E0.6 smiling face
# group: Food & Drink
# subgroup: food-fruit
1F34E                                                  ; fully-qualified     # \U0001f34e E0.6 red apple
# group: Component
# subgroup: skin-tone
1F3FB                                                  ; component           # \U0001f3fb E1.0 light skin tone
"""
TONED = [f"woman astronaut: {tone}" for tone in emoji.TONES]


def entry(name: str, text: str = "x") -> Entry:
    return Entry(text, name, "People & Body", "person-role")


def installed() -> bool:
    try:
        emoji.Painter(emoji.find_font())
        emoji.find_table()
    except ValueError:
        return False
    return True


NEEDS_FONT = pytest.mark.skipif(not installed(), reason="needs fonts-noto-color-emoji, unicode-data and libfribidi0")


def test_the_table():
    found = read_table(TABLE)
    assert found == [
        Entry("\U0001f600", "grinning face", "Smileys & Emotion", "face-smiling"),
        Entry("☺️", "smiling face", "Smileys & Emotion", "face-smiling"),
        Entry("\U0001f34e", "red apple", "Food & Drink", "food-fruit"),
    ]
    assert table_version(TABLE) == "15.0"
    with pytest.raises(ValueError, match="there is no emoji in it"):
        read_table("hello\n")


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("red apple", ["red apple", "a red apple"]),
        ("astronaut", ["astronaut", "an astronaut"]),
        ("grapes", ["grapes"]),
        (
            "woman astronaut: dark skin tone",
            ["woman astronaut: dark skin tone", "a woman astronaut with dark skin tone", "a woman astronaut"],
        ),
        ("flag: Norway", ["flag: Norway", "the flag of Norway"]),
        ("keycap: 1", ["keycap: 1", "the key 1"]),
        ("SOS button", ["SOS button"]),
    ],
)
def test_captions(name, said):
    assert captions(entry(name)) == said


@pytest.mark.parametrize(
    ("name", "pair"),
    [
        ("woman astronaut: dark skin tone", ("astronaut", "dark skin tone")),
        ("astronaut: dark skin tone", ("astronaut", "dark skin tone")),
        ("man: light skin tone, beard", ("person, beard", "light skin tone")),
        ("old woman: medium skin tone", ("old person", "medium skin tone")),
        ("thumbs up: medium-dark skin tone", ("thumbs up", "medium-dark skin tone")),
        ("kiss: man, man, dark skin tone, light skin tone", None),
        ("astronaut", None),
        ("flag: Norway", None),
    ],
)
def test_the_person_and_the_tone(name, pair):
    assert person_and_tone(name) == pair


def test_splits():
    # An emoji's split hangs on its code points alone, and on nothing that comes after it in the table.
    texts = [chr(0x1F300 + number) for number in range(700)]
    splits = [split_of(entry("a thing", text)) for text in texts]
    assert 0.85 < splits.count("train") / 700 < 0.95
    assert {"train", "validation", "test"} == set(splits)
    assert split_of(entry("red apple", "\U0001f34e")) == "train"


def test_no_more_than_one_tone_of_a_person_is_unseen_and_all_genders_of_it_are():
    unseen = set()
    people = [f"worker {number}" for number in range(300)]
    for person in people:
        found = {}
        for who in ("", "man ", "woman "):
            for tone in emoji.TONES:
                found[who, tone] = split_of(entry(f"{who}{person}: {tone}", f"{who}{person}{tone}")) == "unseen"
        tones = {tone for (_, tone), is_unseen in found.items() if is_unseen}
        assert len(tones) <= 1
        if tones:
            unseen.add(person)
            assert all(found[who, tone] for who in ("", "man ", "woman ") for tone in tones)
    assert 0.25 < len(unseen) / len(people) < 0.42


def test_what_is_missing_is_named_with_its_package(tmp_path, monkeypatch):
    for name in ("DALLE2_EMOJI_FONT", "DALLE2_EMOJI_TABLE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(emoji, "FONT_FOLDERS", (str(tmp_path),))
    monkeypatch.setattr(emoji, "TABLE_FOLDERS", (str(tmp_path / "none"),))
    with pytest.raises(ValueError, match="needs emoji-test.txt; install it .*unicode-data.*DALLE2_EMOJI_TABLE"):
        prepare(str(tmp_path / "data"))
    (tmp_path / "emoji-test.txt").write_text(TABLE, encoding="utf-8")
    monkeypatch.setenv("DALLE2_EMOJI_TABLE", str(tmp_path / "emoji-test.txt"))
    with pytest.raises(ValueError, match="needs NotoColorEmoji.ttf; install it .*fonts-noto-color-emoji"):
        prepare(str(tmp_path / "data"))
    (tmp_path / "NotoColorEmoji.ttf").write_text("no font")
    with pytest.raises(ValueError, match="cannot be read as a font .*fonts-noto-color-emoji"):
        prepare(str(tmp_path / "data"))
    monkeypatch.setenv("DALLE2_EMOJI_TABLE", str(tmp_path / "NotoColorEmoji.ttf"))
    with pytest.raises(ValueError, match="cannot be used: there is no emoji in it"):
        prepare(str(tmp_path / "data"))
    monkeypatch.setenv("DALLE2_EMOJI_TABLE", str(tmp_path / "nothing"))
    with pytest.raises(ValueError, match="DALLE2_EMOJI_TABLE names .*, which is no file"):
        prepare(str(tmp_path / "data"))
    assert not (tmp_path / "data").exists()


def test_libfribidi_is_asked_for(monkeypatch):
    from PIL import features

    monkeypatch.setattr(features, "check", lambda name: name != "fribidi")
    with pytest.raises(ValueError, match="fall apart without libfribidi; install it .*libfribidi0"):
        emoji.Painter("any.ttf")


@NEEDS_FONT
def test_images(tmp_path, monkeypatch):
    (tmp_path / "table.txt").write_text(TABLE, encoding="utf-8")
    full = Path(emoji.find_table())
    monkeypatch.setenv("DALLE2_EMOJI_TABLE", str(full))
    entries = read_table(full.read_text(encoding="utf-8"))
    assert len(entries) > 3000 and len({one.text for one in entries}) == len(entries)
    splits = [split_of(one) for one in entries]
    assert all(splits.count(split) > 50 for split in emoji.SPLITS)
    seen = {person_and_tone(one.name) for one, split in zip(entries, splits, strict=True) if split != "unseen"}
    held_out = {person_and_tone(one.name) for one, split in zip(entries, splits, strict=True) if split == "unseen"}
    assert not seen & held_out
    # Each alone is seen: the person in another tone, the tone on another person.
    assert {pair[1] for pair in held_out} <= {pair[1] for pair in seen if pair}
    assert {pair[0] for pair in held_out} <= {pair[0] for pair in seen if pair}

    painter = emoji.Painter(emoji.find_font())
    apple = painter.draw("\U0001f34e")
    assert apple.shape == (136, 136, 3) and (apple[0] == 255).all() and (apple[-1] == 255).all()
    assert apple[70, 60, 0] > 180 and apple[70, 60, 2] < 90
    joined = painter.draw("\U0001f469\U0001f3fd‍\U0001f680")
    alone = painter.draw("\U0001f469\U0001f3fd")
    assert np.abs(joined.astype(int) - alone).mean() > 5
    with pytest.raises(ValueError, match="no single image for U\\+1F34E U\\+1F34E"):
        painter.draw("\U0001f34e\U0001f34e")


@NEEDS_FONT
def test_the_data_set(tmp_path, monkeypatch):
    table = Path(emoji.find_table()).read_text(encoding="utf-8").splitlines()
    kept = [line for number, line in enumerate(table) if "fully-qualified" not in line or number % 40 == 0]
    (tmp_path / "table.txt").write_text("\n".join(kept), encoding="utf-8")
    monkeypatch.setenv("DALLE2_EMOJI_TABLE", str(tmp_path / "table.txt"))
    version = f"unicode_{table_version(chr(10).join(kept)).replace('.', '_')}"
    builder = prepare(str(tmp_path / "data"))
    assert builder.builder_config.name == version
    counts = {split: builder.info.splits[split].num_examples for split in builder.info.splits}
    assert sum(counts.values()) == len(read_table("\n".join(kept))) and set(counts) == set(emoji.SPLITS)
    # What is prepared needs neither font nor table any more.
    monkeypatch.setenv("DALLE2_EMOJI_TABLE", "gone")
    monkeypatch.setenv("DALLE2_EMOJI_FONT", "gone")
    data = Data(name="emoji", data_dir=str(tmp_path / "data"), image_size=32)
    source = open_source(data, "train")
    assert source.images().shape == (counts["train"], 32, 32, 3) and len(source.captions()) == counts["train"]
    with pytest.raises(ValueError, match="DALLE2_EMOJI_TABLE names gone"):
        prepare(os.path.join(tmp_path, "elsewhere"))
