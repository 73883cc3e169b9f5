"""Study problems: held-out splits, repeatable generation, one right answer, not solvable from question and choices.

The tests derive each answer independently, from the observation or the pixels, so that no code checks itself.
"""

import hashlib
import io
import itertools
import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from math import dist
from pathlib import Path
from random import Random

import numpy as np
import pytest
from PIL import Image
from problem_files import check_pictures

from mmcot.evaluation.mistakes import KINDS
from mmcot.problems import study, study_fact
from mmcot.problems.drawing import COLORS, INK
from mmcot.problems.known_datasets import known_dataset_name
from mmcot.problems.schema import FEATURES, check_fields, require_answers
from mmcot.problems.sources import load_problems
from mmcot.problems.study_clevr import CLEVR_COLORS
from mmcot.problems.study_skill import Wording

SKILLS = list(study.SKILLS)
PICTURE_SKILLS = [name for name in SKILLS if study.SKILLS[name].draw]
CORPUS = {passage.id: passage for passage in study.corpus()}
ROWS = {split: list(study.generate(split)) for split in ("val", "test")}
ROWS["train"] = [row for name in SKILLS for row in itertools.islice(study.skill_rows(name, "train", 2), 400)]


def rows_of(skill: str, *splits: str) -> list[dict]:
    return [row for split in splits or ROWS for row in ROWS[split] if row["skill"] == skill]


def right(row: dict) -> str:
    return row["choices"][row["answer"]]


def scene_of(row: dict):
    return study.scene_of(*study.parse_id(row["id"]))


def pixels(picture: dict) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(picture["bytes"])), dtype=int)


# Rows.


@pytest.mark.parametrize("split", ROWS)
def test_rows_are_complete_distinct_and_valid(split):
    rows = ROWS[split]
    assert len({row["id"] for row in rows}) == len(rows)
    for row in rows:
        assert row.keys() == FEATURES.keys() and row["split"] == split
        check_fields(row, "row")
        assert row["observation"] and row["lecture"] and row["topic"] == row["skill"].partition("/")[0]
        assert len(set(row["choices"])) == len(row["choices"]) > 1
        assert bool(row["images"]) == (row["skill"] in PICTURE_SKILLS)
    assert all(len(row["images"]) == 2 for row in rows if row["skill"] == "look/change")


def test_splits_and_families_have_expected_sizes():
    assert len(ROWS["val"]) == study.SPLIT_SIZES["val"] and len(ROWS["test"]) == study.SPLIT_SIZES["test"]
    assert sum(skill.share for skill in study.SKILLS.values()) == 100
    shares = Counter(row["topic"] for row in ROWS["test"])
    assert shares == {"sort_of_clevr": 360, "fact": 300, "logic": 315, "look": 315, "text": 210}
    alone = [row["skill"] for row in study.generate("val", families=("logic", "fact"))]
    assert Counter(name.partition("/")[0] for name in alone) == {"fact": 242, "logic": 3 * 85}


def test_problem_does_not_depend_on_selected_families():
    alone = {row["id"]: row for row in study.generate("val", families=("fact",))}
    assert all(alone[row["id"]] == row for row in rows_of("fact/rare", "val"))


def test_difficulty_changes_training_size_blots_objects_and_corpus():
    easy, hard = (list(study.generate("val", difficulty, ("look",))) for difficulty in (1, 5))
    inked = [np.mean([(pixels(row["images"][0]) == INK).all(-1).sum() for row in rows]) for rows in (easy, hard)]
    assert inked[0] < 100 < inked[1]
    objects = [np.mean([len(row["choices"]) for row in rows if row["skill"] == "look/change"]) for rows in (easy, hard)]
    assert objects == [2, 5]
    assert len(study.corpus(1)) < len(study.corpus(2)) < len(study.corpus(5))
    sizes = [level.num_training_problems for level in study.LEVELS.values()]
    assert sizes == sorted(sizes, reverse=True)


@pytest.mark.parametrize("difficulty", study.LEVELS)
def test_generates_every_skill_at_every_difficulty(difficulty):
    for skill in SKILLS:
        for row in itertools.islice(study.skill_rows(skill, "train", difficulty), 5):
            check_fields(row, "row")
            assert set(row["gold_passages"]) <= {passage.id for passage in study.corpus(difficulty)}


def test_generates_same_rows_in_another_process():
    code = "import hashlib; from mmcot.problems import study; "
    code += "print(hashlib.sha256(repr(list(study.generate('val'))).encode()).hexdigest())"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(study.__file__).parents[2],
        env={**os.environ, "PYTHONHASHSEED": "12345"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == hashlib.sha256(repr(ROWS["val"]).encode()).hexdigest()


def test_source_loads_generated_problems_and_caches_them():
    problems = load_problems("study:text,logic@1", "val")
    assert problems.features == FEATURES
    assert problems.to_list() == list(study.generate("val", 1, ("logic", "text")))
    assert problems.cache_files, "the problems are cached on disk"
    assert known_dataset_name("study:fact@2") == known_dataset_name("study@3") == "study problems"
    check_pictures(problems)
    require_answers(problems)


@pytest.mark.parametrize(
    ("source", "families", "difficulty"),
    [
        ("study", study.FAMILIES, study.DEFAULT_DIFFICULTY),
        ("study@3", study.FAMILIES, 3),
        ("study:logic,fact", ("fact", "logic"), study.DEFAULT_DIFFICULTY),
        ("study:text@5", ("text",), 5),
    ],
)
def test_parses_families_and_difficulty_of_source(source, families, difficulty):
    assert study.parse_source(source) == (families, difficulty)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("study:facts", "family 'facts'; expected .* sort_of_clevr, fact, logic, look, text"),
        ("study:", "family ''"),
        ("study:fact,", "family ''"),
        ("study@0", "difficulty '0'; expected .* from 1 to 5"),
        ("study:fact@hard", "difficulty 'hard'"),
        ("study@", "difficulty ''"),
    ],
)
def test_refuses_unknown_family_or_difficulty(source, message):
    with pytest.raises(ValueError, match=message):
        load_problems(source, "val")


def test_refuses_unknown_arguments_of_generate_and_corpus():
    with pytest.raises(ValueError, match="'dev'.*train, val, test"):
        study.generate("dev")
    with pytest.raises(ValueError, match="families is .'facts',., with the family 'facts'; expected"):
        study.generate("val", families=("facts",))
    with pytest.raises(ValueError, match="with the family 'f'; expected"):
        study.generate("val", families="fact")
    with pytest.raises(ValueError, match="with no family; expected"):
        study.generate("val", families=())
    with pytest.raises(ValueError, match="6; expected 1 to 5"):
        study.corpus(6)


# Held out.


@pytest.mark.parametrize("skill", SKILLS)
def test_splits_share_no_combination(skill):
    found = {split: {study.SKILLS[skill].combination(scene_of(row)) for row in rows_of(skill, split)} for split in ROWS}
    assert all(len(values) > 1 for values in found.values())
    assert not any(found[a] & found[b] for a, b in itertools.combinations(ROWS, 2))


def test_training_contains_words_but_not_rare_animals_of_val_and_test():
    names = {split: {row["observation"] for row in rows_of("fact/rare", split)} for split in ROWS}
    assert not any(names[a] & names[b] for a, b in itertools.combinations(ROWS, 2))
    words = {split: set(" ".join(texts).split()) for split, texts in names.items()}
    assert words["val"] | words["test"] <= words["train"]


def test_every_split_asks_for_the_same_common_animals_with_each_value_once():
    names = {split: {row["observation"] for row in rows_of("fact/common", split)} for split in ROWS}
    assert names["train"] == names["val"] == names["test"] and len(names["train"]) == 8
    assert not names["train"] & {row["observation"] for row in rows_of("fact/rare")}
    for attribute, texts in study_fact.ATTRIBUTES.items():
        assert sorted(study_fact.value_of(signs, attribute) for signs in study_fact.COMMON) == sorted(texts.values)


def test_captions_do_not_depend_on_the_question():
    captions = {}
    for row in rows_of("sort_of_clevr/relational", "val") + rows_of("fact/rare", "val"):
        captions.setdefault(row["images"][0]["bytes"], set()).add(row["caption"])
        assert row["caption"] and row["observation"] not in row["caption"]
    assert all(len(texts) == 1 for texts in captions.values())
    assert not any(row["caption"] for row in rows_of("text/moves"))


def test_training_contains_every_word_of_val_and_test():
    def words(split: str) -> set[str]:
        texts = (" ".join([row["question"], row["context"], row["solution"]]) for row in ROWS[split])
        return set(re.findall(r"\w+", " ".join(texts)))

    assert words("val") | words("test") <= words("train")


def wordings(skill: str, split: str, number: int) -> list[Wording]:
    """Return the texts of problems, without drawing them."""
    scenes = (study.scene_of(skill, split, 2, count) for count in range(number // study.SKILLS[skill].per_scene))
    return [wording for scene in scenes for wording in study.SKILLS[skill].ask(Random(repr(scene)), scene)]


@pytest.mark.parametrize("skill", SKILLS)
def test_question_and_choices_do_not_predict_answer(skill):
    """Guess by training frequencies, given the question and the sorted choices, or the question alone."""
    train, test = wordings(skill, "train", 800), wordings(skill, "test", 800)

    def guessed(key: Callable[[Wording], object]) -> float:
        counts: dict = {}
        for problem in train:
            counts.setdefault(key(problem), Counter())[problem.answer] += 1
        found = [counts.get(key(problem), Counter()) for problem in test]
        choices = [sorted([problem.answer, *problem.others]) for problem in test]
        guesses = [max(choice, key=count.__getitem__) for choice, count in zip(choices, found, strict=True)]
        return np.mean([guess == problem.answer for guess, problem in zip(guesses, test, strict=True)])

    # As in Sort-of-CLEVR, counts of equal shapes are not uniform: of six choices, 3 and 4 are right in 31 % each.
    chance = np.mean([0.31 if len(problem.others) == 5 else 1 / (1 + len(problem.others)) for problem in test])
    assert abs(guessed(lambda problem: (problem.question, *sorted([problem.answer, *problem.others]))) - chance) < 0.1
    assert abs(guessed(lambda problem: problem.question) - chance) < 0.1


@pytest.mark.parametrize("skill", SKILLS)
def test_distributes_answers_evenly_over_positions(skill):
    by_number: dict[int, Counter] = {}
    for row in rows_of(skill):
        by_number.setdefault(len(row["choices"]), Counter())[row["answer"]] += 1
    for number, positions in by_number.items():
        assert all(abs(positions[place] / positions.total() - 1 / number) < 0.1 for place in range(number))


# Answers.


def extreme(facts: list[tuple[str, str]], first: bool) -> str:
    """Return the name that occurs only as the first of the pairs (more, less), or only as the second."""
    sides = ({a for a, _ in facts}, {b for _, b in facts})
    (name,) = sides[0] - sides[1] if first else sides[1] - sides[0]
    return name


def solve_balance(row):
    facts = re.findall(r"The (\w+) ball is heavier than the (\w+) ball", row["observation"])
    return extreme(facts, "heaviest" in row["question"])


def solve_exclusion(row):
    things = re.findall(r"a (\w+) (circle|square|triangle)", row["observation"])
    color, shape = re.search(r"is not (\w+)\. It is not a (\w+)\.", row["context"]).groups()
    (left,) = (number for number, thing in enumerate(things) if thing[0] != color and thing[1] != shape)
    return ["first", "second", "third", "fourth"][left]


def solve_count(row):
    numbers = {color: int(number) for number, color in re.findall(r"(\d) (\w+)", row["observation"])}
    a, b = re.findall(r"more (\w+) dots", row["question"])
    first, second = numbers[a], numbers[b]
    return f"more {a if first > second else b} dots" if first != second else "equally many"


def solve_value(row):
    asked = re.search(r"bar (\w) show", row["question"])[1]
    return re.search(rf"{asked} ends at (\d)", row["observation"])[1]


def solve_relation(row):
    placed = dict(re.findall(r"The (\w+) \w+ is at the ([a-z ]+)\.", row["observation"]))
    places = [placed[color] for color in re.findall(r"the (\w+) thing", row["question"])]
    x = [("left" in place) * -1 + ("right" in place) for place in places]
    y = [("top" in place) * -1 + ("bottom" in place) for place in places]
    if y[0] == y[1]:
        return "to the left" if x[0] < x[1] else "to the right"
    assert x[0] == x[1]
    return "above" if y[0] < y[1] else "below"


def solve_change(row):
    before, after = (set(re.findall(r"a (\w+ \w+)", text)) for text in row["observation"].split(". "))
    (missing,) = before - after
    return f"the {missing}"


def solve_order(row):
    question = row["question"].removeprefix("Who is the ").rstrip("?")
    more = dict.fromkeys(["older", "taller", "faster"], True) | dict.fromkeys(["younger", "shorter", "slower"], False)
    found = re.findall(r"(\w+) is (\w+) than (\w+)\.", row["context"])
    facts = [(a, b) if more[word] else (b, a) for a, word, b in found]
    return extreme(facts, question in ("oldest", "tallest", "fastest"))


def solve_moves(row):
    thing = re.search(r"the (\w+) at the end", row["question"])[1]
    return re.findall(rf"the {thing} to the (\w+)\.", row["context"])[-1]


def solve_fact(row):
    (passage_id,) = row["gold_passages"]
    passage = CORPUS[passage_id]
    assert re.search(r"The animal is the (\w+ \w+)\.", row["observation"])[1] in passage.text
    (named,) = (choice for choice in row["choices"] if passage.text.endswith(f" {choice}."))
    return named


SOLVERS = {
    "fact/common": solve_fact,
    "fact/rare": solve_fact,
    "logic/balance": solve_balance,
    "logic/exclusion": solve_exclusion,
    "logic/count": solve_count,
    "look/value": solve_value,
    "look/relation": solve_relation,
    "look/change": solve_change,
    "text/order": solve_order,
    "text/moves": solve_moves,
}


@pytest.mark.parametrize("skill", SOLVERS)
def test_answer_follows_from_observation(skill):
    for row in rows_of(skill):
        assert SOLVERS[skill](row) == right(row), row["id"]


@pytest.mark.parametrize("skill", SKILLS)
def test_solution_starts_with_observation_and_concludes_only_with_answer(skill):
    for row in rows_of(skill):
        assert row["solution"].startswith(row["observation"])
        conclusion = row["solution"].split(" So, ")[1]
        named = [choice for choice in row["choices"] if re.search(rf"\b{choice}\b", conclusion)]
        assert named == [right(row)], row["solution"]


# Passages.


def test_corpus_contains_fact_once_among_distractors():
    assert len(CORPUS) == len(study.corpus()) == 1944
    assert all(passage.title and passage.text and passage.source for passage in CORPUS.values())
    row = rows_of("fact/rare", "test")[0]
    (gold,) = row["gold_passages"]
    name, attribute = gold.rsplit("-", 1)
    assert sum(passage_id.startswith(f"{name}-") for passage_id in CORPUS) == 6
    assert sum(passage_id.endswith(f"-{attribute}") for passage_id in CORPUS) == 324
    text = CORPUS[gold].text
    assert [passage.id for passage in CORPUS.values() if passage.text == text] == [gold]
    assert row["lecture"] == text


def test_passages_contain_no_question_or_solution():
    texts = "\n".join(passage.text for passage in CORPUS.values())
    for row in rows_of("fact/rare"):
        assert row["question"] not in texts and row["solution"] not in texts
        assert set(row["gold_passages"]) <= CORPUS.keys()
    assert not any(row["gold_passages"] for split in ROWS for row in ROWS[split] if row["topic"] != "fact")


# Pictures.


def color_masks(image: np.ndarray, palette: dict) -> dict[str, np.ndarray]:
    """Return the mask of each color that fills more pixels than the blended edges of other colors."""
    masks = {color: np.abs(image - np.array(value)).max(-1) < 12 for color, value in palette.items()}
    return {color: mask for color, mask in masks.items() if mask.sum() > 20}


@pytest.mark.parametrize("skill", [name for name in PICTURE_SKILLS if not name.startswith("fact/")])
def test_pictures_show_exactly_drawn_colors(skill):
    palette = CLEVR_COLORS if skill.startswith("sort_of_clevr") else COLORS
    for row in rows_of(skill, "val"):
        shown = set(color_masks(pixels(row["images"][0]), palette))
        assert shown == study.drawn_names(row["id"]) & palette.keys(), row["id"]


@pytest.mark.parametrize("skill", ["sort_of_clevr/non_relational", "sort_of_clevr/relational"])
def test_answer_of_sort_of_clevr_follows_from_pixels(skill):
    for row in rows_of(skill, "val", "test"):
        masks = color_masks(pixels(row["images"][0]), CLEVR_COLORS)
        assert len(masks) == 6
        centers = {color: np.argwhere(mask).mean(0)[::-1] for color, mask in masks.items()}
        # The whole square has 14 x 14 px, so no object covers another.
        shapes = {color: "square" if mask.sum() > 180 else "circle" for color, mask in masks.items()}
        assert all(mask.sum() > (180 if shapes[color] == "square" else 120) for color, mask in masks.items())
        color = re.search(r"(\w+) object(?: \w+ the (?:left|top)|\?| on| at)", row["question"])[1]
        distances = {other: dist(centers[color], centers[other]) for other in centers if other != color}
        answers = {
            "on the left": "yes" if centers[color][0] < 47.5 else "no",
            "at the top": "yes" if centers[color][1] < 47.5 else "no",
            "How many": str(list(shapes.values()).count(shapes[color])),
            "closest": shapes[min(distances, key=distances.get)],
            "furthest": shapes[max(distances, key=distances.get)],
            "What is the shape of the": shapes[color],
        }
        assert right(row) == next(answer for words, answer in answers.items() if words in row["question"]), row["id"]


def test_sort_of_clevr_asks_ten_questions_of_each_group_per_picture():
    for split in ("val", "test"):
        groups = [
            Counter(row["images"][0]["bytes"] for row in rows_of(f"sort_of_clevr/{group}", split))
            for group in ("non_relational", "relational")
        ]
        assert groups[0] == groups[1] and set(groups[0].values()) == {10}
    training = [row["images"][0]["bytes"] for row in rows_of("sort_of_clevr/relational", "train")]
    assert len(set(training)) == len(training)


@pytest.mark.parametrize("skill", SKILLS)
def test_drawn_names_cover_observation_and_belong_to_vocabulary(skill):
    for row in rows_of(skill, "val"):
        drawn, vocabulary = study.drawn_names(row["id"]), study.vocabulary(row["id"])
        assert bool(drawn) == bool(vocabulary) == (skill in PICTURE_SKILLS)
        assert drawn <= vocabulary
        assert {word for word in re.findall(r"\w+", row["observation"]) if word in vocabulary} <= drawn


@pytest.mark.parametrize("problem_id", ["val-objects-0", "val-fact.plants-2-0-0", "dev-fact.rare-2-0-0", "12"])
def test_refuses_drawn_names_of_other_problem(problem_id):
    with pytest.raises(ValueError, match=f"{problem_id}: not a study problem"):
        study.drawn_names(problem_id)


def test_expected_mistakes_are_kinds_of_mistake_analysis():
    assert study.EXPECTED_MISTAKES.keys() == study.SKILLS.keys()
    assert set(study.EXPECTED_MISTAKES.values()) <= KINDS.keys()
    assert study.EXPECTED_MISTAKES["fact/rare"] == "factual"
