"""Generates the study problems, on which more than two stages can help: `study[:FAMILY,…][@DIFFICULTY]`.

Each problem has an observation (the details of the picture that the question needs), a caption that does not depend on
the question, a lecture (the rule or the fact that it needs), a solution and an answer, so that a stage can be trained
for each. As in the demonstration, texts come from templates, pictures are drawn from seeded random numbers, and val and
test contain combinations of values that never occur in training. The id alone determines a problem, so the selection of
families does not change it.

A family is a file: `study_clevr.py`, `study_fact.py`, `study_logic.py`, `study_look.py`, `study_text.py`. A skill is a
row of the file's table `SKILLS` (`study_skill.py` describes a row).
"""

import re
import sys
from collections.abc import Iterator, Sequence
from itertools import count
from random import Random
from typing import Any

from mmcot.problems import drawing, study_clevr, study_fact, study_logic, study_look, study_skill, study_text
from mmcot.problems.drawing import Canvas, split_of_combination
from mmcot.problems.study_fact import Passage
from mmcot.problems.study_skill import Level, Skill, Wording

SKILLS: dict[str, Skill] = {
    name: skill
    for module in (study_clevr, study_fact, study_logic, study_look, study_text)
    for name, skill in module.SKILLS.items()
}
FAMILIES: tuple[str, ...] = tuple(dict.fromkeys(name.partition("/")[0] for name in SKILLS))

LEVELS = {
    1: Level(num_objects=2, num_blots=0, num_attributes=4, num_training_problems=12_000),
    2: Level(num_objects=3, num_blots=0, num_attributes=6, num_training_problems=12_000),
    3: Level(num_objects=4, num_blots=0, num_attributes=8, num_training_problems=12_000),
    4: Level(num_objects=4, num_blots=1, num_attributes=10, num_training_problems=8_000),
    5: Level(num_objects=5, num_blots=2, num_attributes=12, num_training_problems=4_000),
}
DEFAULT_DIFFICULTY = 2
SPLIT_SIZES = {"val": 500, "test": 1_500}  # of all families together; the difficulty determines the size of train

# The kind of mistake (`evaluation.mistakes`) that is expected if a problem of a skill is answered wrongly.
EXPECTED_MISTAKES: dict[str, str] = {name: skill.mistake for name, skill in SKILLS.items()}


def parse_source(source: str) -> tuple[tuple[str, ...], int]:
    """
    Parse `study[:FAMILY,…][@DIFFICULTY]` into the families, in the order of `FAMILIES`, and the difficulty.

    Raises:
        ValueError: a family or the difficulty is unknown.
    """
    match = re.fullmatch(r"study(?::([^@]*))?(?:@(.*))?", source)
    named, difficulty = match.groups() if match else ("", "")
    families = FAMILIES if named is None else tuple(named.split(","))
    check_families(families, f"dataset is {source!r}")
    if difficulty is not None and difficulty not in map(str, LEVELS):
        raise ValueError(
            f"dataset is {source!r}, with the difficulty {difficulty!r}; expected study@DIFFICULTY from "
            f"{min(LEVELS)} to {max(LEVELS)}."
        )
    return tuple(name for name in FAMILIES if name in families), int(difficulty or DEFAULT_DIFFICULTY)


def check_families(families: Sequence[str], where: str) -> None:
    """
    Raises:
        ValueError: no family is given, or an unknown one.
    """
    unknown = [family for family in families if family not in FAMILIES]
    if unknown or not families:
        found = f"the family {unknown[0]!r}" if unknown else "no family"
        raise ValueError(f"{where}, with {found}; expected families of {', '.join(FAMILIES)}.")


def generate(
    split: str, difficulty: int = DEFAULT_DIFFICULTY, families: Sequence[str] = FAMILIES
) -> Iterator[dict[str, Any]]:
    """
    Yield the problems of a split, with the skills interleaved. The rows are the same in every process.

    Args:
        split: `train`, `val` or `test`.
        difficulty: a key of `LEVELS`.
        families: generate only problems of these families. The number of problems in the split stays the same.
    """
    sizes = {"train": level_of(difficulty).num_training_problems, **SPLIT_SIZES}
    if split not in sizes:
        raise ValueError(f"unknown split {split!r}: expected one of {', '.join(sizes)}")
    check_families(families, f"families is {families!r}")
    skills = {name: skill for name, skill in SKILLS.items() if name.partition("/")[0] in families}
    total = sum(skill.share for skill in skills.values())
    rows = {name: skill_rows(name, split, difficulty) for name in skills}
    order = [name for name, skill in skills.items() for _ in range(sizes[split] * skill.share // total)]
    Random(f"order {split}").shuffle(order)
    return (next(rows[name]) for name in order)


def corpus(difficulty: int = DEFAULT_DIFFICULTY) -> list[Passage]:
    """Return the passages that state the facts of the family `fact`: `id`, `title`, `text`, `source`."""
    return study_fact.corpus(level_of(difficulty))


def drawn_names(problem_id: str) -> set[str]:
    """
    Return the names of everything that the pictures of a problem show; empty for a problem without a picture.

    Raises:
        ValueError: no study problem has such an id.
    """
    name, split, difficulty, number = parse_id(problem_id)
    return SKILLS[name].named(scene_of(name, split, difficulty, number))


def vocabulary(problem_id: str) -> frozenset[str]:
    """Return the names of everything that any picture of the problem's skill may show, in the form of `drawn_names`."""
    return SKILLS[parse_id(problem_id)[0]].vocabulary


def parse_id(problem_id: str) -> tuple[str, str, int, int]:
    """Return the skill, the split, the difficulty and the number of the scene of a problem."""
    match = re.fullmatch(r"(train|val|test)-([\w.]+)-(\d)-(\d+)-\d", problem_id)
    name = match[2].replace(".", "/") if match else ""
    if match is None or name not in SKILLS:
        raise ValueError(f"problem {problem_id}: not a study problem; expected an id such as val-fact.rare-2-0-0.")
    return name, match[1], int(match[3]), int(match[4])


def level_of(difficulty: int) -> Level:
    """
    Return the settings of a difficulty.

    Raises:
        ValueError: the difficulty is unknown.
    """
    if difficulty not in LEVELS:
        raise ValueError(f"difficulty is {difficulty!r}; expected {min(LEVELS)} to {max(LEVELS)}.")
    return LEVELS[difficulty]


def scene_seed(name: str, split: str, difficulty: int, number: int) -> str:
    return f"{SKILLS[name].scenes or name} {split} {difficulty} {number}"


def scene_of(name: str, split: str, difficulty: int, number: int) -> Any:
    """Return a scene of a skill whose combination of values belongs to the split."""
    skill, rng = SKILLS[name], Random(scene_seed(name, split, difficulty, number))
    while True:
        scene = skill.sample(rng, level_of(difficulty))
        if split_of_combination(skill.scenes or name, skill.combination(scene)) == split:
            return scene


def skill_rows(name: str, split: str, difficulty: int) -> Iterator[dict[str, Any]]:
    """Yield an endless series of distinct rows of one skill."""
    skill, known = SKILLS[name], set()
    for number in count():
        scene = scene_of(name, split, difficulty, number)
        pictures = draw_pictures(name, split, difficulty, number, scene)
        wordings = skill.ask(Random(f"{name} {split} {difficulty} {number}"), scene)
        for turn, wording in enumerate(wordings[:1] if split == "train" else wordings):
            row_id = f"{split}-{name.replace('/', '.')}-{difficulty}-{number}-{turn}"
            key = (wording.question, wording.context, *sorted([wording.answer, *wording.others]), *pictures)
            if key not in known:
                known.add(key)
                yield row_of(name, wording, row_id, split, pictures, skill.caption(scene))


def draw_pictures(name: str, split: str, difficulty: int, number: int, scene: Any) -> list[bytes]:
    """Return the pictures of a scene as PNG, with the blots of the difficulty."""
    skill, ink = SKILLS[name], Random(f"{scene_seed(name, split, difficulty, number)} blots")
    canvases: list[Canvas] = skill.draw(scene) if skill.draw else []
    for canvas in canvases:
        for _ in range(level_of(difficulty).num_blots):
            canvas.blot(ink)
    return [canvas.png() for canvas in canvases]


def row_of(name: str, wording: Wording, row_id: str, split: str, pictures: list[bytes], caption: str) -> dict[str, Any]:
    """Return the row of a problem in the schema, with its choices in random order."""
    skill = SKILLS[name]
    choices = [wording.answer, *wording.others]
    Random(f"{row_id} choices").shuffle(choices)
    return {
        "id": row_id,
        "question": wording.question,
        "choices": choices,
        "context": wording.context,
        "images": [{"bytes": picture, "path": None} for picture in pictures],
        "caption": caption,
        "answer": choices.index(wording.answer),
        "lecture": wording.lecture or skill.lecture,
        "solution": wording.solution,
        "rationales": [],
        "direct_answers": [],
        "observation": wording.observation,
        "gold_passages": list(wording.gold_passages),
        "subject": skill.subject,
        "grade": skill.grade,
        "topic": name.partition("/")[0],
        "category": skill.category,
        "skill": name,
        "split": split,
    }


# The code that determines the problems. The key of their cache depends on it.
MODULES = (sys.modules[__name__], drawing, study_skill, study_clevr, study_fact, study_logic, study_look, study_text)
