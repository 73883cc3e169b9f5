"""Tests of the demonstration problems: held out, repeatable, balanced, and consistent with their pixels.

The tests measure the content of a picture from its decoded pixels, with their own palette and geometry, so that the
drawing code is not checked against itself. They do not test whether a model can learn the problems.
"""

import hashlib
import io
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mmcot.problems import demo
from mmcot.problems.sources import load_problems

SPLITS = ("train", "val", "test")
ROWS = {split: list(demo.generate(split)) for split in SPLITS}
PALETTE = {
    "red": (255, 0, 0),
    "yellow": (255, 220, 0),
    "green": (0, 160, 40),
    "blue": (0, 80, 255),
    "purple": (170, 40, 210),
    "black": (0, 0, 0),
}
SCHEMA = ["id", "question", "choices", "context", "images", "caption", "answer", "lecture", "solution"]
SCHEMA += ["rationales", "direct_answers", "subject", "grade", "topic", "category", "skill", "split"]


def rows_of(skill: str, *splits: str) -> list[dict]:
    return [row for split in splits or SPLITS for row in ROWS[split] if row["skill"] == skill]


def png(row: dict) -> bytes | None:
    return row["images"][0]["bytes"] if row["images"] else None


def key(row: dict) -> tuple:
    return row["question"], row["context"], *sorted(row["choices"]), png(row)


def pixels(row: dict) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(png(row))), dtype=int)


def mask_of(image: np.ndarray, color: str) -> np.ndarray:
    """The pixels that have about this color of the palette."""
    return np.abs(image - PALETTE[color]).max(-1) < 60


def color_of(image: np.ndarray, y: int, x: int) -> str:
    return min(PALETTE, key=lambda name: np.abs(image[y, x] - PALETTE[name]).sum())


@pytest.mark.parametrize("split", SPLITS)
def test_split_has_its_size_schema_and_unique_ids(split):
    rows = ROWS[split]
    assert len(rows) == demo.SPLIT_SIZES[split]
    assert all(list(row) == SCHEMA and row["split"] == split for row in rows)
    assert len({row["id"] for row in rows}) == len(rows)
    assert {row["skill"] for row in rows} == {name for name, skill in demo.SKILLS.items() if skill.share}
    assert all(bool(row["images"]) == (row["skill"] in demo.PICTURE_SKILLS) for row in rows)


@pytest.mark.parametrize("split", SPLITS)
def test_every_class_of_the_score_table_has_problems(split):
    classes = Counter()
    for row in ROWS[split]:
        classes[row["subject"]] += 1
        classes["text"] += bool(row["context"])
        classes["picture"] += bool(row["images"])
        classes["neither"] += not row["context"] and not row["images"]
        classes["low" if int(row["grade"].removeprefix("grade")) <= 6 else "high"] += 1
    subjects = ("natural science", "social science", "language science")
    assert all(classes[name] > 0 for name in (*subjects, "text", "picture", "neither", "low", "high"))
    assert split != "test" or classes["picture"] >= 1200


def test_no_problem_occurs_twice():
    keys = Counter(key(row) for split in SPLITS for row in ROWS[split])
    assert len(keys) == sum(demo.SPLIT_SIZES.values())


def test_no_picture_of_val_or_test_is_in_train():
    train = {png(row) for row in ROWS["train"]} - {None}
    assert not train & {png(row) for split in ("val", "test") for row in ROWS[split]}


@pytest.mark.parametrize("skill", ["bar_chart", "objects"])
def test_no_statement_of_three_or_more_facts_of_val_or_test_is_in_train(skill):
    facts = {demo.observation(row["solution"]) for row in rows_of(skill, "train")}
    assert not facts & {demo.observation(row["solution"]) for row in rows_of(skill, "val", "test")}


def test_every_word_occurs_in_train():
    def words(split: str) -> set[str]:
        text = " ".join(" ".join([row["question"], row["context"], row["solution"]]) for row in ROWS[split])
        return set(re.findall(r"\w+", text))

    assert words("val") | words("test") <= words("train")


def test_two_picture_skills_have_many_pictures_and_three_choices_or_more():
    rich = [
        skill
        for skill in demo.PICTURE_SKILLS
        if len({png(row) for row in rows_of(skill)}) >= 1000 and min(len(r["choices"]) for r in rows_of(skill)) >= 3
    ]
    assert len(rich) >= 2


def test_rows_are_the_same_in_another_process():
    code = "import hashlib; from mmcot.problems import demo; "
    code += "print(hashlib.sha256(repr(list(demo.generate('val'))).encode()).hexdigest())"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONHASHSEED": "12345", "PYTHONPATH": str(Path(demo.__file__).parents[1])},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == hashlib.sha256(repr(ROWS["val"]).encode()).hexdigest()


def test_names_an_unknown_split():
    with pytest.raises(ValueError, match="'dev'.*train, val, test"):
        demo.generate("dev")


def test_raises_for_a_split_that_is_too_large(monkeypatch):
    monkeypatch.setitem(demo.SPLIT_SIZES, "val", 4_000)  # 240 of them with the skill demand
    with pytest.raises(ValueError, match="'demand' has only .* for split 'val'"):
        list(demo.generate("val"))


@pytest.mark.parametrize("skill", [name for name, skill in demo.SKILLS.items() if skill.share])
@pytest.mark.parametrize("split", ["train", "test"])
def test_answers_are_balanced_over_positions(skill, split):
    rows = rows_of(skill, split)
    number = len(rows[0]["choices"])
    positions = Counter(row["answer"] for row in rows)
    assert all(abs(positions[i] / len(rows) - 1 / number) < 0.10 for i in range(number))


@pytest.mark.parametrize("skill", demo.PICTURE_SKILLS)
def test_text_of_a_picture_problem_does_not_reveal_the_answer(skill):
    """Guessing from question and sorted choices, as counted in training, is near chance on test."""
    counts: dict[tuple, Counter] = {}
    for row in rows_of(skill, "train"):
        text = (row["question"], *sorted(row["choices"]))
        counts.setdefault(text, Counter())[row["choices"][row["answer"]]] += 1
    rows = rows_of(skill, "test")
    guesses = [counts.get((row["question"], *sorted(row["choices"])), Counter()).most_common(1) for row in rows]
    right = [guess[0][0] == row["choices"][row["answer"]] for guess, row in zip(guesses, rows, strict=True) if guess]
    assert abs(np.mean(right) - 1 / len(rows[0]["choices"])) < 0.10


def test_solution_concludes_with_the_answer_and_no_other_choice():
    for row in (row for split in SPLITS for row in ROWS[split]):
        facts, conclusion = row["solution"].split(" So, ")
        named = [choice for choice in row["choices"] if re.search(rf"\b{choice}\b", conclusion)]
        assert named == [row["choices"][row["answer"]]], row["solution"]
        assert len(set(row["choices"])) == len(row["choices"])
        assert demo.observation(row["solution"]) == facts
        assert "\n" not in row["solution"] and len(row["solution"].split()) <= 25


@pytest.mark.parametrize(
    ("rationale", "facts"),
    [("A is red. So, it is red.", "A is red."), ("no conclusion", "no conclusion"), ("", "")],
)
def test_observation_is_the_text_before_the_conclusion(rationale, facts):
    assert demo.observation(rationale) == facts


def test_pictures_are_small_rgb_pngs():
    for row in (row for split in SPLITS for row in ROWS[split] if row["images"]):
        (picture,) = row["images"]
        image = Image.open(io.BytesIO(picture["bytes"]))
        assert (image.format, image.mode, image.size, picture["path"]) == ("PNG", "RGB", (96, 96), None)


def test_charts_match_their_solutions():
    for row in rows_of("bar_chart", "val", "test"):
        image = pixels(row)
        bars = []
        for column in (20, 52, 84):
            color = color_of(image, 80, column)  # 80: inside the lowest unit of every bar
            units = mask_of(image, color)[:88, column].sum() / 16  # 88: the axis
            assert abs(units - round(units)) < 0.2
            bars.append((color, round(units)))
        stated = re.findall(r"the (\w+) bar (?:shows )?(\d)", row["solution"].lower())
        assert stated == [(color, str(height)) for color, height in bars]
        extreme = max if "tallest" in row["question"] else min
        assert row["choices"][row["answer"]] == extreme(bars, key=lambda bar: bar[1])[0]


def test_magnets_match_their_solutions():
    for row in rows_of("magnets", "val", "test"):
        image = pixels(row)
        red, blue = mask_of(image, "red"), mask_of(image, "blue")
        used = np.flatnonzero((red | blue).any(0))
        (gap,) = np.flatnonzero(np.diff(used) > 1)  # one gap between the two magnets
        facing = [
            "north" if red[:, x].sum() > blue[:, x].sum() else "south" for x in (used[gap] - 1, used[gap + 1] + 1)
        ]
        assert f"are {facing[0]} and {facing[1]}." in row["solution"]
        assert row["choices"][row["answer"]] == ("repel" if facing[0] == facing[1] else "attract")


def test_stars_match_their_solutions():
    names = [["northwest", "north", "northeast"], ["west", "", "east"], ["southwest", "south", "southeast"]]
    for row in rows_of("map", "val", "test"):
        image = pixels(row)
        color = max(PALETTE, key=lambda name: mask_of(image, name).sum())
        y, x = (int(values.mean()) // 32 for values in np.nonzero(mask_of(image, color)))
        assert row["choices"][row["answer"]] == names[y][x]
        assert row["solution"].startswith(f"The {color} star is at the ")
        sides = [["top", "", "bottom"][y], ["left", "", "right"][x]]
        assert f"at the {' '.join(filter(None, sides))} of the map" in row["solution"]


def test_thermometers_match_their_solutions():
    for row in rows_of("thermometer", "val", "test"):
        image = pixels(row)
        color = max(PALETTE, key=lambda name: mask_of(image, name)[80:].sum())  # below 80 there is only the bulb
        column = mask_of(image, color).sum(0).argmax()
        top = np.flatnonzero(mask_of(image, color)[:, column])[0]
        mark = round((76 - int(top)) / 8) * 10
        assert row["solution"].startswith(f"The {color} column reaches the {mark} mark.")
        assert row["choices"][row["answer"]] == f"{mark} degrees"


def test_objects_match_their_solutions():
    fills = {"square": 1.0, "circle": np.pi / 4, "triangle": 0.5}  # part of the box around it that a shape covers
    for row in rows_of("objects", "val", "test"):
        image = pixels(row)
        drawn = []
        for left in (0, 32, 64):
            color = color_of(image, 48, left + 16)
            mask = mask_of(image[:, left : left + 32], color)
            height, width = mask.any(1).sum(), mask.any(0).sum()
            covered = mask.sum() / (height * width)
            drawn.append((color, min(fills, key=lambda shape: abs(fills[shape] - covered))))
        assert re.findall(r"a (\w+) (circle|square|triangle)", row["solution"]) == drawn
        asked = row["question"].removeprefix("What color is the ").rstrip("?")
        assert (row["choices"][row["answer"]], asked) in drawn


def test_harder_demonstration_has_fewer_training_problems_and_ink_on_pictures():
    """The problems are otherwise the same."""
    assert len(list(demo.generate("train", difficulty=3))) == demo.SPLIT_SIZES["train"] // 3
    plain, harder = ROWS["val"], list(demo.generate("val", difficulty=3))
    assert len(harder) == len(plain)
    for before, after in zip(plain, harder, strict=True):
        assert {**before, "images": None} == {**after, "images": None}
        if before["images"]:
            a, b = (np.asarray(Image.open(io.BytesIO(png(row)))).astype(int) for row in (before, after))
            inked = (a != b).any(axis=2)
            # two blots of 26 px, which may overlap or extend beyond the edge
            assert 0 < inked.sum() <= 2 * 26 * 26 and (np.median(b[inked], axis=0) == demo.INK).all()


def test_one_skill_fills_a_split_with_gold_choices_of_any_length():
    rows = list(demo.generate("test", skill="descriptions"))
    assert len(rows) == demo.SPLIT_SIZES["test"] and {row["skill"] for row in rows} == {"descriptions"}
    by_length = Counter(sorted(row["choices"], key=len).index(row["choices"][row["answer"]]) for row in rows)
    positions = Counter(row["answer"] for row in rows)
    for counts in (by_length, positions):
        assert all(abs(counts[number] / len(rows) - 1 / 3) < 0.05 for number in range(3))
    for row in rows[:200]:
        drawn = dict(re.findall(r"a (\w+) (\w+)", row["solution"].partition(" So,")[0]))
        colors = {shape: color for color, shape in drawn.items()}
        truths = [all(colors[a] == b for a, b in re.findall(r"the (\w+) is (\w+)", text)) for text in row["choices"]]
        assert truths == [number == row["answer"] for number in range(3)]


@pytest.mark.parametrize("source", ["demo:0", "demo:hard", "demo:1.5"])
def test_refuses_an_unknown_difficulty_or_skill(source):
    with pytest.raises(ValueError, match="a difficulty from 1 to 9, or a skill: magnets, "):
        load_problems(source, "val")
